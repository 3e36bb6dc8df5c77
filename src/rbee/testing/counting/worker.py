"""The counting worker: the program `llama-worker-rbee` with another engine."""

from __future__ import annotations

import signal
from typing import NoReturn

from rbee.contracts.home import Home
from rbee.narration import FileSink
from rbee.testing.counting.acts import ActingSink, Acts
from rbee.testing.counting.behaviour import behaviour_of
from rbee.testing.counting.engine import CountingEngine, CountingOptions
from rbee.worker.__main__ import main as worker_main
from rbee.worker.settings import WorkerSettings


def main() -> NoReturn:
    """Run one worker that counts."""
    worker_main(_run)


def _run(settings: WorkerSettings, sink: FileSink) -> None:
    from rbee.worker.lifecycle import run_worker

    behaviour, acts = behaviour_of(settings.model), Acts()
    if behaviour.ignores_term:  # in every thread, so before there is a second one
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    options = CountingOptions(
        model=settings.model,
        alias=settings.shown_model,
        directory=Home.at(settings.home).workers / settings.worker_id,
        context_tokens=settings.context_tokens,
    )
    run_worker(settings, CountingEngine(options, behaviour, acts), ActingSink(sink.fd, acts))


if __name__ == "__main__":
    main()
