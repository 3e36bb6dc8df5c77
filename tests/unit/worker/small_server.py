"""A small server that knows nothing of rbee: `small_server.py PORT-or-SOCKET BEHAVIOUR [word …]`.

It answers `/health` as its behaviour says, and `/said` with its arguments and its environment.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

LOADS = 3


class Handler(BaseHTTPRequestHandler):
    """Answers."""

    behaviour = ""
    asked = 0

    def do_GET(self) -> None:
        """Answer one question."""
        if self.path == "/said":
            self._answer(
                200, {"argv": sys.argv[1:], "env": dict(os.environ), "key": self.headers["authorization"]}
            )
            return
        Handler.asked += 1
        match self.behaviour:
            case "silent":
                time.sleep(3600)
            case "loading":
                self._answer(503, {"error": "loading"})
            case "flaps":
                self._answer((404, 500, 503)[Handler.asked % 3], {})
            case "lacks_health":
                self._answer(404, {})
            case _:
                self._answer(503 if Handler.asked <= LOADS else 200, {})

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        """Name nobody: callers on a unix socket have no address."""
        return "somebody"


class SocketServer(ThreadingMixIn, UnixStreamServer):
    """The same on a unix socket."""

    daemon_threads = True


def main() -> None:
    """Serve."""
    place, Handler.behaviour = sys.argv[1:3]
    match Handler.behaviour:
        case "dies":
            print("cook: no such model, my key is hunter2-hunter2", flush=True)
            sys.exit(7)
        case "tells":
            print("cook: started with", *sys.argv[3:], flush=True)
            sys.exit(7)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stranger":  # somebody else listens there, and this process lives
            subprocess.Popen(["setsid", "-f", sys.executable, __file__, place, "good"], env=os.environ)
            time.sleep(3600)
        case "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case "family":  # has a child that leaves its group
            subprocess.Popen(["sleep", "3600"], start_new_session=True)
    if place.isdigit():
        ThreadingHTTPServer(("127.0.0.1", int(place)), Handler).serve_forever()
    else:
        SocketServer(place, Handler).serve_forever()


if __name__ == "__main__":
    main()
