"""An engine that is a server of its own: started by the worker from a command of the configuration.

It listens where the worker says, on loopback or on a unix socket. What it prints goes to the worker's stderr.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
import time
from pathlib import Path

import psutil
from msgspec import Struct

from rbee.contracts.engine_settings import EngineSettings, fill
from rbee.errors import ModelInvalidError, StartError
from rbee.narration import narrate
from rbee.processes import Child, ProcessSpec, child_environment, kill_tree, spawn, stop_tree
from rbee.worker.engines import EngineAddress, EngineTraits
from rbee.worker.engines.probe import Probe, ask_ready
from rbee.worker.engines.socket_place import socket_place
from rbee.worker.engines.stderr_tail import stderr_end, stderr_size

HOST = "127.0.0.1"
LOOK_EVERY_S = 0.1
LAST_WORDS_CHARS = 300
_OUR_STDERR = Path("/proc/self/fd/2")
# What an engine says while it loads, or before it is there.
_LOADING = (None, 503)


class CommandOptions(Struct, frozen=True, kw_only=True):
    """What to start and for what.

    Attributes:
        name: The engine's name in the configuration.
        model: The file's path, or the model's name where the engine fetches it.
        alias: The name the model is shown under.
        directory: The worker's own directory (0700).
        environment: Variables of ours that the engine gets besides the allow-list, such as `RBEE_HOME`.
        context_tokens: Per request.
        device: What was asked for, such as `cuda:0`; None where nothing was.
    """

    name: str
    settings: EngineSettings
    model: str
    alias: str
    directory: Path
    environment: dict[str, str]
    marker: tuple[str, str]
    slots: int
    context_tokens: int
    device: str | None = None


class Command:
    """One engine of the configuration."""

    version = None
    holds_threads = False

    def __init__(self, options: CommandOptions) -> None:
        """Take what to start; nothing is touched before `load`."""
        self._options = options
        self._process: CommandProcess | None = None

    @property
    def name(self) -> str:
        """The engine's name in the configuration."""
        return self._options.name

    def load(self) -> EngineAddress:
        """Start the server and wait until it is ready, or has ended, or its time is over.

        Raises:
            ModelInvalidError: The model's file is not there.
            StartError: The server cannot be started, ended, or was not ready in time; with its last words.
        """
        options = self._options
        if options.settings.needs_file and not Path(options.model).exists():
            raise ModelInvalidError(
                f"There is no model file at {options.model}.", remedy="Pull the model again, or name another file."
            )
        address, values = self._place()
        said_before = stderr_size()
        process = self._process = self._start(values)
        try:
            self._until_ready(process, address, said_before)
        except BaseException:
            asyncio.run(process.stop(0))
            raise
        model_name = fill(options.settings.model_name, values)
        traits = EngineTraits(
            name=self.name,
            is_built_in=False,
            model_name=model_name,
            has_prefill=options.settings.prefill,
        )
        return EngineAddress(address.socket_path, address.key, address.url, traits, process)

    def kill(self) -> None:
        """Kill the server and everything it started."""
        if self._process is not None:
            self._process.kill()

    def _place(self) -> tuple[EngineAddress, dict[str, str]]:
        """Choose where the server is to listen; returns it with the values of all placeholders."""
        options, key = self._options, secrets.token_hex(32)
        values = {
            "model": options.model,
            "model_name": options.alias,
            "host": HOST,
            "slots": str(options.slots),
            "context_tokens": str(options.context_tokens),
            "api_key": key,
            "device": (options.device or "auto").partition(":")[0],
        }
        if options.settings.listens_on_socket():
            address = EngineAddress(socket_place(options.directory), key)
            return address, {**values, "socket": address.socket_path}
        port = _free_port()
        return EngineAddress("", key, f"http://{HOST}:{port}"), {**values, "port": str(port)}

    def _start(self, values: dict[str, str]) -> CommandProcess:
        options, settings = self._options, self._options.settings
        key = {settings.api_key_env: values["api_key"]} if settings.api_key_env else {}
        environment = {**options.environment, options.marker[0]: options.marker[1]}
        child = spawn(
            ProcessSpec(
                command=tuple(fill(word, values) for word in settings.command),
                env=child_environment({**settings.env, **key, **environment}),
                stdout=_OUR_STDERR,
                stderr=_OUR_STDERR,
                parent_death_signal=signal.SIGKILL,
            )
        )
        return CommandProcess(self.name, child, options.marker)

    def _until_ready(self, process: CommandProcess, address: EngineAddress, said_before: int | None) -> None:
        settings = self._options.settings
        deadline_s = time.monotonic() + settings.ready_timeout_s
        told: Probe | None = None
        narrated = set(_LOADING)
        while True:
            if (status := process.child.poll()) is not None:
                raise self._failed(f"{status.describe()} before it was ready", address, said_before)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                answered = told.describe(settings.ready) if told else f"{settings.ready} was not answered"
                raise self._failed(
                    f"was not ready after {settings.ready_timeout_s:g} s: {answered}", address, said_before
                )
            found = ask_ready(address, settings.ready, min(left_s, 5.0))
            if found.status == 200:
                break
            if found.status not in narrated:
                narrated.add(found.status)
                narrate(
                    "worker_engine_wait", f"The engine {self.name} is up, but {found.describe(settings.ready)}."
                )
            told = found if found.status is not None else told
            time.sleep(min(left_s, LOOK_EVERY_S))
        if not address.socket_path and not process.listens_on(int(address.url.rpartition(":")[2])):
            raise self._failed("is not who answers on the port it was given", address, said_before)

    def _failed(self, what: str, address: EngineAddress, said_before: int | None) -> StartError:
        settings = self._options.settings
        words = settings.without_values(stderr_end(said_before).rstrip().rpartition("\n")[2].strip(), address.key)
        last = f" Its last words: {words[:LAST_WORDS_CHARS]}" if words else ""
        return StartError(
            f"The engine {self.name} {what}.{last}",
            remedy=f"See all that it said (rbee logs --worker), then mend [engines.{self.name}] in rbee.toml.",
        )


class CommandProcess:
    """The server's process, in a session of its own; it dies with the worker."""

    def __init__(self, name: str, child: Child, marker: tuple[str, str]) -> None:
        """Take what was started, and the variable by which what left its parents is found."""
        self.child = child
        self._name = name
        self._marker = marker

    async def ended(self) -> str:
        """Wait for its end, and return how it ended in one sentence."""
        status = await self.child.wait()
        return f"The engine {self._name} {status.describe()}."

    async def stop(self, grace_s: float) -> None:
        """Stop it with everything it started: TERM, `grace_s`, KILL; returns when all of that is gone."""
        await stop_tree(self.child, marker=self._marker, grace_s=grace_s)

    def kill(self) -> None:
        """Kill it, and what it left when it has ended, at once and from any thread."""
        kill_tree(self.child, marker=self._marker)

    def listens_on(self, port: int) -> bool:
        """Tell whether it, or a process it started, is who listens on a port; a stranger may have taken it."""
        try:
            root = psutil.Process(self.child.pid)
            for process in (root, *root.children(recursive=True)):
                for found in process.net_connections(kind="tcp"):
                    if found.status == psutil.CONN_LISTEN and found.laddr.port == port:
                        return True
        except psutil.Error:
            pass  # one of them has just ended
        return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port
