from __future__ import annotations

import pytest

from rbee.hive.shown_line import shown_line
from tests.unit.queen.queen_stage import closing, narration, token


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"plain words", "plain words"),
        (b"caf\xff", "caf\ufffd"),
        (b"", ""),
        (narration("worker_load_model", "Loading.")[:-1], "worker_load_model: Loading."),
        (token("job-a", text="secret")[:-1], ""),
        (closing("job-a", attempt=1)[:-1], ""),
        (narration("worker_say", "About one request.", job_id="job-a", attempt=1)[:-1][:60], ""),
        (b"\0\0\0rest of a line in a hole", ""),
    ],
)
def test_last_lines_hold_nothing_that_is_one_jobs_alone(line: bytes, shown: str) -> None:
    assert shown_line(line) == shown
