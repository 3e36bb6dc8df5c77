"""The sides of the serving benchmark: how each control plane is started, and where it is asked then."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import psutil
from msgspec import Struct

from benchmarks.bench_start import programs
from benchmarks.pipeline_stage import cpu_s, free_port, memory_bytes
from benchmarks.services import ServiceMissingError, program
from benchmarks.serving_client import SideFailedError, Target, until_ready
from benchmarks.serving_worker import PACED, write_paced_programs
from rbee.contracts.models import DEFAULT_MODEL
from rbee.testing import LocalStack
from rbee.testing.counting import write_model
from rbee.testing.counting.programs import HIVE, WORKER

FLOOD_STREAMS = 128
STOP_S = 5.0
QUEEN = "queen-rbee"
KILL_S = 5.0
_ROOT = Path(__file__).parent.parent


class Plane(Struct, frozen=True):
    """A control plane that runs.

    Attributes:
        target: Where it is asked.
        start_s: Seconds from its start to its first answer that it is ready.
        pids: Returns its processes by the name of their program; an engine's is not among them.
        launch: Loads the model, where that has to be said; a request does it otherwise.
        beside: Processes that belong to it and are not counted, with their name.
    """

    target: Target
    start_s: float
    pids: Callable[[], dict[str, list[int]]]
    launch: Callable[[], Awaitable[None]] | None = None
    beside: dict[str, int] = {}

    def memory_mb(self) -> float:
        """Return its share of the memory in megabytes."""
        return sum(_of_living(memory_bytes, pid) for pids in self.pids().values() for pid in pids) / 1e6

    def beside_mb(self) -> dict[str, float]:
        """Return the share of each process that is not counted."""
        return {name: _of_living(memory_bytes, pid) / 1e6 for name, pid in self.beside.items()}

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds that its processes have used, by program."""
        return {name: sum(_of_living(cpu_s, pid) for pid in pids) for name, pids in self.pids().items()}


class Engines(Struct, frozen=True):
    """What all sides share: the model's file, the directory it is in, and an engine with it that runs."""

    model: Path
    models: Path
    real: Target


Start = Callable[[Engines, Target], AbstractAsyncContextManager[Plane]]


class Side(Struct, frozen=True):
    """One that is measured.

    Attributes:
        title: Its name.
        start: Starts its control plane, given the engine to pass requests on to where it has none of its own.
        flood: The same for the flood of pieces, given the paced engine; None where that cannot be done.
        starts: How often it is started, for cold start, memory and launch.
        has_launch: It loads models itself.
        has_answers: Its answers are timed too.
    """

    title: str
    start: Start
    flood: Start | None = None
    starts: int = 1
    has_launch: bool = False
    has_answers: bool = True


def _of_living(measure: Callable[[int], float], pid: int) -> float:
    try:
        return measure(pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has ended


def tree_pids(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def tree(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program beside the block; afterwards nothing of what it started is left, whatever group that is in."""
    members: list[psutil.Process] = []
    try:
        with program(command, env=env, cwd=cwd, grace_s=STOP_S) as process:
            try:
                yield process
            finally:
                with contextlib.suppress(psutil.NoSuchProcess):
                    members = psutil.Process(process.pid).children(recursive=True)
    finally:
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()  # looks at the start time first
        psutil.wait_procs(members, timeout=KILL_S)


@asynccontextmanager
async def listening(
    command: Sequence[str | Path],
    target: Target,
    path: str,
    *,
    env: Mapping[str, str] | None = None,
    launch: Callable[[subprocess.Popen[bytes]], Awaitable[None]] | None = None,
    status: str = "200",
) -> AsyncIterator[Plane]:
    """Run a program that is ready when a path of it answers."""
    began_s = time.perf_counter()
    with tree(command, env=env, cwd=_ROOT) as process:
        await until_ready(target.url, path, lambda: process.poll() is None, status=status)
        start_s = time.perf_counter() - began_s
        yield Plane(
            target,
            start_s,
            lambda: {"all": tree_pids(process.pid)},
            None if launch is None else lambda: launch(process),
        )


def local(port: int) -> str:
    """Return the address of a port here."""
    return f"http://127.0.0.1:{port}"


def engine_command(model: Path, port: int) -> list[str]:
    """Return the command of a worker's engine alone; it can be run from anywhere."""
    return [sys.executable, str(_ROOT / "benchmarks" / "serving_engine.py"), str(model), str(port)]


@asynccontextmanager
async def engine(model: Path) -> AsyncIterator[Plane]:
    """Run a worker's engine alone."""
    port = free_port()
    target = Target(local(port), DEFAULT_MODEL)
    async with listening(engine_command(model, port), target, "/health") as plane:
        yield plane


@asynccontextmanager
async def paced_engine() -> AsyncIterator[Target]:
    """Run the engine that makes a piece each 5 ms."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", PACED, str(port)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=_ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if await process.stdout.readline() != b"ready\n":
            raise SideFailedError("The paced engine did not start.")
        yield Target(local(port), "paced")
    finally:
        process.stdin.close()
        await process.wait()


@asynccontextmanager
async def smallest_proxy(engines: Engines, upstream: Target) -> AsyncIterator[Plane]:
    """Run the smallest proxy before an engine."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.serving_proxy", str(port), upstream.url]
    async with listening(command, Target(local(port), upstream.model), "/v1/models") as plane:
        yield plane


_NGINX = """\
daemon off;
error_log stderr error;
pid {directory}/pid;
worker_processes 1;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass {upstream}; proxy_buffering off; proxy_http_version 1.1; }}
    }}
}}
"""


def nginx_program() -> str:
    """Return nginx's program.

    Raises:
        ServiceMissingError: It is not installed.
    """
    found = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if found is None:
        raise ServiceMissingError("nginx is not installed")
    return found


@asynccontextmanager
async def nginx(engines: Engines, upstream: Target) -> AsyncIterator[Plane]:
    """Run nginx before an engine, its buffering off."""
    port = free_port()
    found = nginx_program()
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as name:
        Path(name).chmod(0o755)  # its worker is another user where root starts it
        config = Path(name) / "nginx.conf"
        config.write_text(_NGINX.format(directory=name, port=port, upstream=upstream.url), "utf-8")
        command = [found, "-e", "stderr", "-c", str(config), "-p", name]
        async with listening(command, Target(local(port), upstream.model), "/v1/models") as plane:
            yield plane


@asynccontextmanager
async def rbee(engines: Engines, upstream: Target) -> AsyncIterator[Plane]:
    """Run `rbee up` as it is installed, with its own settings, in a home of its own."""
    async with LocalStack(models=engines.models, with_queen=False, config="") as stack:
        began_s = time.perf_counter()
        up = await stack.start_up()
        await until_ready(up.url, "/readyz", lambda: True)
        start_s = time.perf_counter() - began_s
        found = programs(stack)
        keeper = found.pop("rbee")
        yield Plane(
            Target(up.url, DEFAULT_MODEL),
            start_s,
            lambda: {name: [pid] for name, pid in found.items()},
            beside={"rbee up": keeper},
        )


@asynccontextmanager
async def rbee_paced(engines: Engines, upstream: Target) -> AsyncIterator[Plane]:
    """Run a queen and a hive whose worker has the paced engine, and a slot for every stream."""
    config = f"[queen]\nslots = {FLOOD_STREAMS}\n"
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as name:
        write_paced_programs(Path(name) / "bin")
        model = write_model(Path(name) / "paced.gguf")
        began_s = time.perf_counter()
        async with LocalStack(config=config, programs=Path(name) / "bin") as stack:
            start_s = time.perf_counter() - began_s
            yield Plane(Target(stack.url, model), start_s, lambda: _by_program(stack.processes()))


def _by_program(pids: list[int]) -> dict[str, list[int]]:
    """Sort processes by the console script that they are; others, such as the engine, are left out."""
    found: dict[str, list[int]] = {name: [] for name in (QUEEN, HIVE, WORKER)}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            for name in {word.rpartition(b"/")[2].decode("utf-8", "replace") for word in words[:2]} & found.keys():
                found[name].append(pid)
    return found


SMALLEST = Side("smallest HTTP proxy", smallest_proxy, smallest_proxy, starts=3)
NGINX = Side("nginx, buffering off", nginx, nginx, has_answers=False)
RBEE = Side("rbee", rbee, rbee_paced, starts=5, has_launch=True)
