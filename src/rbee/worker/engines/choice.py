"""Choose the engine of a worker by its settings."""

from __future__ import annotations

from rbee.contracts.engine_settings import EngineSettings, load_engine_table
from rbee.contracts.home import Home
from rbee.worker.engines import Engine
from rbee.worker.settings import WorkerSettings


def engine_of(settings: WorkerSettings) -> Engine:
    """Make the engine that is asked for; nothing of it is loaded yet.

    Raises:
        ConfigurationError: rbee.toml cannot be used.
        InvalidRequestError: It describes no such engine.
    """
    home = Home.at(settings.home)
    described = load_engine_table(home.config).find(settings.engine)
    return _llama_cpp(settings, home) if described is None else _command(settings, home, described)


def _llama_cpp(settings: WorkerSettings, home: Home) -> Engine:
    from rbee.worker.engines.llama_cpp import EngineOptions, LlamaCpp

    return LlamaCpp(
        EngineOptions(
            model=settings.model,
            alias=settings.shown_model,
            directory=home.workers / settings.worker_id,
            slots=settings.slots,
            context_tokens=settings.context_tokens,
            gpu_layers=settings.gpu_layers,
            threads=settings.threads,
            embedding=settings.embedding,
            reranking=settings.reranking,
        )
    )


def _command(settings: WorkerSettings, home: Home, described: EngineSettings) -> Engine:
    from rbee.worker.engines.command import Command, CommandOptions

    return Command(
        CommandOptions(
            name=settings.engine,
            settings=described,
            model=str(settings.model),
            alias=settings.shown_model,
            directory=home.workers / settings.worker_id,
            environment={"RBEE_HOME": str(home.root)},
            marker=("RBEE_WORKER_ID", settings.worker_id),
            slots=settings.slots,
            context_tokens=settings.context_tokens,
            device=settings.device,
        )
    )
