"""One side of `bench_narrate`: says events into a file, so many each time a number comes on stdin.

Run as a program with the side's name and the file; it runs in rbee's environment or in the peers' and imports only
what its side needs. For each number it answers with the nanoseconds of CPU time an event took.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

NAMES = {
    "job_id": "job-01kb0c6w4fvt5k8rkx3m6y7z2a",
    "correlation_id": "3c5e1c1e-8d1c-4b6e-9d8e-0a1b2c3d4e5f",
    "hive_id": "hive-01kb0c5d2epq7s9t1v3x5z7b9c",
    "worker_id": "worker-01kb0c5s8ghj2k4m6n8p0q2r4s",
}
ACTION = "worker_inference"
MESSAGES = [f"Answered with {number} tokens in 1.2 s." for number in range(1000)]

# Says so many events, each with six fields, in the context of `NAMES`.
Speak = Callable[[int], None]


def fields_of(number: int) -> dict[str, Any]:
    """Return what one event says: the fields of a worker's closing line."""
    return {
        "outcome": "completed",
        "prompt_tokens": 35,
        "completion_tokens": number,
        "time_to_first_token_s": 0.031,
        "tokens_per_s": 118.25,
        "finish_reason": "stop",
    }


def limit(path: str) -> Speak:
    """The least that can be done: encode a struct, append a newline, one write."""
    msgspec: Any = import_module("msgspec")
    event: Any = msgspec.defstruct(
        "Event",
        ["v", "kind", "ts", "actor", "action", "message", *NAMES, "fields"],
        frozen=True,
    )
    encode, write, time_ns = msgspec.json.Encoder().encode, os.write, time.time_ns
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    job, correlation, hive, worker = NAMES.values()

    def speak(count: int) -> None:
        for number, message in zip(range(count), itertools.cycle(MESSAGES), strict=False):
            line = encode(
                event(
                    1,
                    "narration",
                    time_ns(),
                    "worker",
                    ACTION,
                    message,
                    job,
                    correlation,
                    hive,
                    worker,
                    {
                        "outcome": "completed",
                        "prompt_tokens": 35,
                        "completion_tokens": number,
                        "time_to_first_token_s": 0.031,
                        "tokens_per_s": 118.25,
                        "finish_reason": "stop",
                    },
                )
            )
            write(fd, line + b"\n")

    return speak


def rbee(path: str) -> Speak:
    """`narrate()`, with redaction."""
    narration: Any = import_module("rbee.narration")
    sink = narration.FileSink(os.open(path, os.O_WRONLY | os.O_APPEND))
    narration.configure(actor="worker", sink=sink, hive_id=NAMES["hive_id"], worker_id=NAMES["worker_id"])
    narrate = narration.narrate

    def speak(count: int) -> None:
        with narration.scope(job_id=NAMES["job_id"], correlation_id=NAMES["correlation_id"]):
            _call(narrate, count)

    return speak


def new_scopes(path: str) -> Speak:
    """`narrate()`, each event in a scope of its own."""
    rbee(path)
    narration: Any = import_module("rbee.narration")
    narrate, scope = narration.narrate, narration.scope

    def speak(count: int) -> None:
        for number, message in zip(range(count), itertools.cycle(MESSAGES), strict=False):
            with scope(job_id=NAMES["job_id"], correlation_id=NAMES["correlation_id"]):
                narrate(ACTION, message, **fields_of(number))

    return speak


def signs(path: str) -> Speak:
    """`narrate()` of a sentence with signs that secrets have too, so that it is looked at closer."""
    rbee(path)
    narration: Any = import_module("rbee.narration")
    narrate, scope = narration.narrate, narration.scope

    def speak(count: int) -> None:
        with scope(job_id=NAMES["job_id"], correlation_id=NAMES["correlation_id"]):
            for number in range(count):
                narrate(
                    ACTION, f"Answer {number} of the model: http://127.0.0.1:8500/v1/jobs", **fields_of(number)
                )

    return speak


def secrets(path: str) -> Speak:
    """`narrate()` of a sentence with a secret in it."""
    rbee(path)
    narration: Any = import_module("rbee.narration")
    narrate, scope = narration.narrate, narration.scope

    def speak(count: int) -> None:
        with scope(job_id=NAMES["job_id"], correlation_id=NAMES["correlation_id"]):
            for number in range(count):
                narrate(ACTION, f"Answer {number} for token: 8c4f91ab2 given", **fields_of(number))

    return speak


def structlog(path: str) -> Speak:
    """The fastest set-up of its documentation: bytes, a cached and filtering logger, contextvars, orjson."""
    module, orjson, logging = (import_module(name) for name in ("structlog", "orjson", "logging"))
    module.configure(
        cache_logger_on_first_use=True,
        wrapper_class=module.make_filtering_bound_logger(logging.INFO),
        processors=[
            module.contextvars.merge_contextvars,
            module.processors.add_log_level,
            module.processors.format_exc_info,
            module.processors.TimeStamper(fmt="iso", utc=True),
            module.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        logger_factory=module.BytesLoggerFactory(file=open(path, "ab", buffering=0)),  # noqa: SIM115
    )
    module.contextvars.bind_contextvars(actor="worker", **NAMES)
    info = module.get_logger().bind().info

    def speak(count: int) -> None:
        for number, message in zip(range(count), itertools.cycle(MESSAGES), strict=False):
            info(
                message,
                action=ACTION,
                outcome="completed",
                prompt_tokens=35,
                completion_tokens=number,
                time_to_first_token_s=0.031,
                tokens_per_s=118.25,
                finish_reason="stop",
            )

    return speak


def json_logging(path: str) -> Speak:
    """The standard library's logging with python-json-logger, orjson inside, a filter for the context."""
    logging, formatters = import_module("logging"), import_module("pythonjsonlogger.orjson")
    handler = logging.StreamHandler(open(path, "a", buffering=1))  # noqa: SIM115
    handler.setFormatter(formatters.OrjsonFormatter("%(created)f %(message)s", static_fields=NAMES))
    logger = logging.getLogger("worker")
    logger.addHandler(handler)
    logger.setLevel("INFO")
    logger.propagate = False

    def speak(count: int) -> None:
        for number, message in zip(range(count), itertools.cycle(MESSAGES), strict=False):
            logger.info(message, extra={"action": ACTION, **fields_of(number)})

    return speak


def loguru(path: str) -> Speak:
    """Loguru with `serialize=True` and a contextualized logger."""
    logger: Any = import_module("loguru").logger
    logger.remove()
    logger.add(open(path, "a", buffering=1), serialize=True, format="{message}", level="INFO")  # noqa: SIM115
    bound = logger.bind(**NAMES)

    def speak(count: int) -> None:
        for number, message in zip(range(count), itertools.cycle(MESSAGES), strict=False):
            bound.info(message, action=ACTION, **fields_of(number))

    return speak


def _call(narrate: Callable[..., None], count: int) -> None:
    for number, message in zip(range(count), itertools.cycle(MESSAGES), strict=False):
        narrate(
            ACTION,
            message,
            outcome="completed",
            prompt_tokens=35,
            completion_tokens=number,
            time_to_first_token_s=0.031,
            tokens_per_s=118.25,
            finish_reason="stop",
        )


SIDES = {one.__name__: one for one in (limit, rbee, new_scopes, signs, secrets, structlog, json_logging, loguru)}


def main() -> None:
    """Answer each number on stdin with the nanoseconds an event took."""
    speak = SIDES[sys.argv[1]](sys.argv[2])
    for asked in sys.stdin:
        count = int(asked)
        started_ns = time.process_time_ns()
        speak(count)
        print((time.process_time_ns() - started_ns) / count, flush=True)


if __name__ == "__main__":
    main()
