"""Ray Serve: started without a model; on SIGUSR1 a deployment is run that starts the engine and streams through.

Run as a program with the port and the directory for its files. `BENCH_ENGINE` is the engine's command as a JSON
list, `BENCH_ENGINE_URL` where it answers then.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any

ray: Any = import_module("ray")
serve: Any = import_module("ray.serve")
aiohttp: Any = import_module("aiohttp")
responses: Any = import_module("starlette.responses")

AT_ONCE = 256
POLL_S = 0.01


class Engine:
    """One model; its requests go on to the engine, a connection each, because that closes it after a stream."""

    def __init__(self, command: list[str], url: str) -> None:
        """Start the engine; ready when this returns."""
        self._process = subprocess.Popen(command)
        self._url = url
        self._session: Any = None  # made in the loop that answers
        while not self._is_ready():
            time.sleep(POLL_S)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health") as response:
                return bool(response.status == 200)
        except OSError:  # it does not listen, or says 503
            return False

    async def __call__(self, request: Any) -> Any:
        """Answer one request."""
        if request.method == "GET":
            return responses.Response()
        return responses.StreamingResponse(self._stream(await request.body()), media_type="text/event-stream")

    async def _stream(self, body: bytes) -> AsyncIterator[bytes]:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        headers = {"content-type": "application/json"}
        asked = self._session.post(f"{self._url}/v1/chat/completions", data=body, headers=headers)
        async with asked as response:
            async for part in response.content.iter_any():
                yield part


def main() -> None:
    """Run until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # before there is a second thread
    port, directory = int(sys.argv[1]), sys.argv[2]
    ray.init(_temp_dir=directory, _node_ip_address="127.0.0.1", dashboard_port=0)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    signal.sigwait({signal.SIGUSR1})
    deployment = serve.deployment(max_ongoing_requests=AT_ONCE)(Engine)
    serve.run(deployment.bind(json.loads(os.environ["BENCH_ENGINE"]), os.environ["BENCH_ENGINE_URL"]))
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
