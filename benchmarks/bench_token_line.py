"""What one token of a kept answer costs in the worker: from the engine's frame to its line on stdout."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.report import Row, main, median
from rbee.contracts.dialects import DIALECTS
from rbee.contracts.frames import FrameSplitter, frames_data
from rbee.narration import FileSink
from rbee.worker.calls import Call
from rbee.worker.keep import TokenWriter
from rbee.worker.mending import Mender
from rbee.worker.reading import decode_chunk
from rbee.worker.tally import Tally

ROUNDS = 15
SMALL_ROUNDS = 3
TOKENS = 2_000
SMALL_TOKENS = 200

# One frame as the engine sends it.
_FRAME = (
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":" word"}}],"created":1795690822,"id":'
    b'"chatcmpl-0a1b2c3d4e5f6a7b8c9d0e1f2a3b4c5d","model":"smollm2:135m","system_fingerprint":"b1-0000000",'
    b'"object":"chat.completion.chunk","timings":{"cache_n":0,"prompt_n":35,"prompt_ms":50.25,'
    b'"prompt_per_token_ms":1.43,"prompt_per_second":696.51,"predicted_n":%d,"predicted_ms":812.5,'
    b'"predicted_per_token_ms":8.12,"predicted_per_second":123.07}}\n\n'
)


def _writer(fd: int, tally: Tally) -> TokenWriter:
    call = Call(
        request_id="job-01kb0c6w4fvt5k8rkx3m6y7z2a.1",
        job_id="job-01kb0c6w4fvt5k8rkx3m6y7z2a",
        correlation_id="3c5e1c1e-8d1c-4b6e-9d8e-0a1b2c3d4e5f",
        attempt=1,
        keep="text",
    )
    worker_id = "worker-01kb0c5s8ghj2k4m6n8p0q2r4s"
    dialect = DIALECTS["/v1/chat/completions"]
    mender = Mender(dialect.path, {}, "smollm2:135m")
    return TokenWriter(
        FileSink(fd), worker_id=worker_id, call=call, dialect=dialect, tally=tally, timings=False, mender=mender
    )


def _whole_way(fd: int, count: int) -> None:
    """Do for each frame what `read_answer` does, without a connection."""
    tally, splitter = Tally(), FrameSplitter()
    writer = _writer(fd, tally)
    for number in range(count):
        for data in frames_data(splitter.feed(_FRAME % number)):
            tally.note_arrival()
            chunk = decode_chunk(data)
            tally.observe(chunk)
            writer.write(data, chunk)


def _only_writing(fd: int, count: int) -> None:
    line = b"x" * 280 + b"\n"
    for _ in range(count):
        os.write(fd, line)


def _timed_ns(path: Path, speak: Callable[[int, int], None], count: int) -> float:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    started_ns = time.process_time_ns()
    speak(fd, count)
    taken_ns = time.process_time_ns() - started_ns
    os.close(fd)
    if path.read_bytes().count(b"\n") != count:
        sys.exit("Lines were lost.")
    return taken_ns / count


def measure(is_small: bool) -> Sequence[Row]:
    """Let both take turns."""
    rounds, count = (SMALL_ROUNDS, SMALL_TOKENS) if is_small else (ROUNDS, TOKENS)
    whole_ns, written_ns = [], []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "stdout"
        for _ in range(rounds):
            written_ns.append(_timed_ns(path, _only_writing, count))
            whole_ns.append(_timed_ns(path, _whole_way, count))
    ratio = median([whole / written for whole, written in zip(whole_ns, written_ns, strict=True)])
    return [
        Row("one write of a line as long", f"{median(written_ns):,.0f} ns"),
        Row("frame → token line", f"{median(whole_ns):,.0f} ns", "one write", ratio),
    ]


if __name__ == "__main__":
    main("A kept answer's token in the worker: CPU time", measure)
