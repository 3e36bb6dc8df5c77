"""A worker's engine alone, on a port: xllamacpp's server with the very parameters that a worker gives it.

Run as a program with the model file and the port. `SLOTS` and `CONTEXT_TOKENS` are those that a queen asks for.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from rbee.contracts.models import DEFAULT_MODEL
from rbee.queen.settings import QueenSettings
from rbee.worker.engines.llama_cpp import EngineOptions, LlamaCpp, _xllamacpp

SLOTS = QueenSettings().slots
CONTEXT_TOKENS = QueenSettings().context_tokens


def main() -> None:
    """Load the model, listen, and answer until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # tearing down waits for what is generated
    options = EngineOptions(
        model=Path(sys.argv[1]),
        alias=DEFAULT_MODEL,
        directory=Path(),  # of a socket that is not used here
        slots=SLOTS,
        context_tokens=CONTEXT_TOKENS,
    )
    xllamacpp = _xllamacpp()
    parameters = LlamaCpp(options)._parameters(xllamacpp)
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = int(sys.argv[2])
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
