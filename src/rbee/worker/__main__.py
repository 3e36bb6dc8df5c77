"""The console script `llama-worker-rbee`."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from rbee.contracts.settings import load_settings
from rbee.errors import ConfigurationError, ModelInvalidError, RbeeError
from rbee.narration import FileSink, configure, narrate, scope
from rbee.worker.settings import WorkerSettings

INTERNAL_EXIT = 1
MODEL_INVALID_EXIT = 4
FAILED_BEFORE_READY_EXIT = 3

Run = Callable[[WorkerSettings, FileSink], None]


def main(run: Run | None = None) -> NoReturn:
    """Run one worker, which `run` does when it is to have another engine than llama.cpp.

    Exit codes: 0 stopped, 1 a fault or a hive that was gone for too long, 2 configuration, 3 failed before ready,
    4 the model cannot be loaded.
    """
    try:
        settings = load_settings(WorkerSettings)
        settings.check()
    except ConfigurationError as error:
        print(f"llama-worker-rbee: {error.message} {error.remedy}", file=sys.stderr)  # noqa: T201
        _leave(error.exit_code)
    if settings.hive_id is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the hive to act on
    sink = FileSink(_claim_stdout())
    configure(actor="worker", sink=sink, hive_id=settings.hive_id, worker_id=settings.worker_id)
    code = INTERNAL_EXIT
    try:
        with scope(model=settings.shown_model):
            code = _run(settings, sink, run or _run_engine)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc(file=sys.stderr)
        _leave(code)


def _run(settings: WorkerSettings, sink: FileSink, run: Run) -> int:
    try:
        run(settings, sink)
    except RbeeError as error:
        _say_failed(settings, error)
        return MODEL_INVALID_EXIT if isinstance(error, ModelInvalidError) else FAILED_BEFORE_READY_EXIT
    return 0


def _run_engine(settings: WorkerSettings, sink: FileSink) -> None:
    # Only now, so that `--help` and a wrong flag answer at once.
    from rbee.worker.engines.choice import engine_of
    from rbee.worker.lifecycle import run_worker

    run_worker(settings, engine_of(settings), sink)


def _say_failed(settings: WorkerSettings, error: RbeeError) -> None:
    with scope(job_id=settings.job_id, correlation_id=settings.correlation_id):
        narrate(
            "worker_failed",
            error.message,
            level="error",
            error={"code": error.code, "message": error.message, "remedy": error.remedy, "reason": error.reason},
        )


def _claim_stdout() -> int:
    """Keep stdout for narration alone: what any library prints there goes to stderr from here on."""
    ours = os.dup(1)
    os.dup2(2, 1)
    return ours


def _leave(code: int) -> NoReturn:
    """End at once, without tearing the engine down: that waits for what it generates."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
