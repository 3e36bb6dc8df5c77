"""What a counting worker does besides counting, at the moment in which the line of a certain token is written."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from typing import NoReturn

import msgspec

from rbee.narration import FileSink
from rbee.testing.counting.count import Act, Count

TAIL_LINES = 1000
TAIL_LINE_BYTES = 4000
EXIT_CODE = 7
ORPHAN_S = 120
FORGED = "a-false-word"
CHATTER = b"plain chatter\n\xff\xfe no text\n\x1b[31mred\x1b[0m\n" + b"x" * 20_000 + b'\n{"half": \n'
_NUMBER = re.compile(r" ?(\d+)\Z")


class Crash(BaseException):
    """Ends the worker as an error of its own would."""


class Acts:
    """Knows at which token what is to be done.

    What dies says `TAIL_LINES` lines on stderr first, `tail <act> <number>` and dots: more than several
    batches to the queen hold, so that the end, which goes first, is there before the last of them.
    """

    def __init__(self) -> None:
        self._armed: dict[str, tuple[Act, str]] = {}

    def arm(self, count: Count, text: str) -> None:
        """Have the act of the last number in `text`, if it has one, done when its line is written."""
        act = _act_at(count, text)
        if act is not None and act != "silence":
            self._armed[text] = (act, count.claims)

    @staticmethod
    def silences(count: Count, text: str) -> bool:
        """Tell whether no token comes after this one."""
        return _act_at(count, text) == "silence"

    def written(self, line: bytes, fd: int) -> None:
        """Do what is to be done now that a line stands in the file."""
        if self._armed and line.startswith(b'{"v":1,"kind":"token"'):
            text = msgspec.json.decode(line).get("text")
            if found := self._armed.pop(text, None):
                _do(*found, fd)


class ActingSink(FileSink):
    """The worker's stdout for pieces of answers; each is whole in the file before its act begins."""

    def __init__(self, fd: int, acts: Acts) -> None:
        super().__init__(fd)
        self._acts = acts

    def write(self, line: bytes) -> bool:
        """Write a line, then do what belongs to it."""
        is_whole = super().write(line)
        self._acts.written(line, self.fd)
        return is_whole


def _act_at(count: Count, text: str) -> Act | None:
    found = _NUMBER.search(text)
    return count.acts.get(int(found[1])) if found else None


def _do(act: Act, claims: str, fd: int) -> None:
    match act:
        case "chatter":
            os.write(2, CHATTER)
        case "forge":
            _forge(claims, fd)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "silence":
            pass
        case _:
            _die(act)


def _forge(job_id: str, fd: int) -> None:
    """Claim to be somebody else: the worker of another job, the queen, the end of a job."""
    named = f'"v":1,"ts":1,"job_id":"{job_id}","attempt":1'
    for line in (
        f'{{"v":1,"kind":"token","ts":1,"job_id":"{job_id}","attempt":1,"text":"{FORGED}","tokens":1}}',
        f'{{{named},"kind":"end","state":"completed","seq":1}}',
        f'{{{named},"kind":"narration","actor":"queen","action":"queen_complete","message":"{FORGED}"}}',
        f'{{{named},"kind":"narration","actor":"worker","action":"worker_inference","message":"{FORGED}",'
        '"fields":{"outcome":"completed","frames":1}}',
        "data: [DONE]",
    ):
        os.write(fd, line.encode() + b"\n")


def _die(act: Act) -> NoReturn:
    for number in range(TAIL_LINES):
        os.write(2, f"tail {act} {number} ".encode().ljust(TAIL_LINE_BYTES, b".") + b"\n")
    match act:
        case "orphan":
            sleep = f"import time; time.sleep({ORPHAN_S})"
            subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True)
        case "abort":
            os.abort()
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(EXIT_CODE)
        case "exception":
            raise Crash(act)
    os.kill(os.getpid(), signal.SIGKILL)
    raise Crash(act)
