"""An engine that has no model: every stream gets a piece each 5 ms, in the form in which llama.cpp sends it.

Run as a program with a port, or with a path for a unix socket. It ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import itertools
import sys

import uvloop

from benchmarks.serving_request import RequestProtocol

STEP_S = 0.005
PIECES_MAX = 24_000  # two minutes
BACKLOG = 512
MODEL = "paced"

_HEAD = (
    b'"created":1795690822,"id":"chatcmpl-0a1b2c3d4e5f6a7b8c9d0e1f2a3b4c5d","model":"paced",'
    b'"system_fingerprint":"b1-0000000","object":"chat.completion.chunk"}\n\n'
)


def _framed(frames: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(frames), frames)


def _frame(delta: bytes, finish_reason: bytes = b"null") -> bytes:
    choice = b'{"finish_reason":%b,"index":0,"delta":%b}' % (finish_reason, delta)
    return b'data: {"choices":[%b],' % choice + _HEAD


_BEGIN = (
    b"HTTP/1.1 200 OK\r\nServer: paced\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    + _framed(_frame(b'{"role":"assistant","content":null}'))
)
# Not the same one again and again: LiteLLM ends an answer that repeats itself.
_PIECES = [_framed(_frame(b'{"content":" word-%02d"}' % number)) for number in range(64)]
_END = _framed(_frame(b"{}", b'"length"')) + _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_MODELS = b'{"object":"list","data":[{"id":"paced","object":"model","meta":{"n_ctx":4096}}]}'

# Streams do not keep step with one another: each begins in another fifth of the 5 ms.
_phases = itertools.cycle(number * STEP_S / 5 for number in range(5))


class _Stream(RequestProtocol):
    """One connection; what its caller does not take is left out, so that the pace holds."""

    _timer: asyncio.TimerHandle | None = None
    _is_paused = False
    _sent = 0

    def asked(self, method: str, path: str, body: bytes) -> None:
        if method == "GET":
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(_MODELS)}\r\n"
            self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + _MODELS)
            self.transport.close()
            return
        self.transport.write(_BEGIN)
        self._loop = asyncio.get_running_loop()
        self._next_s = self._loop.time() + next(_phases)
        self._timer = self._loop.call_at(self._next_s, self._say)

    def _say(self) -> None:
        self._sent += 1
        if self._sent > PIECES_MAX:
            self.transport.write(_END)
            self.transport.close()
            return
        if not self._is_paused:
            self.transport.write(_PIECES[self._sent % len(_PIECES)])
        self._next_s += STEP_S
        self._timer = self._loop.call_at(self._next_s, self._say)

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()


async def _serve(place: str) -> None:
    loop = asyncio.get_running_loop()
    if place.isdecimal():
        server = await loop.create_server(_Stream, "127.0.0.1", int(place), backlog=BACKLOG)
    else:
        server = await loop.create_unix_server(_Stream, place, backlog=BACKLOG)
    async with server:
        print("ready", flush=True)
        await loop.run_in_executor(None, sys.stdin.buffer.read)


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1]))
