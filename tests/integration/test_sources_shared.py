"""One models directory used by many: tasks, processes, and a disk that fills up."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rbee.errors import DownloadFailedError
from rbee.hive.models import ModelStore
from rbee.hive.sources.hub import HubSource
from rbee.narration.emit import captured_narration
from rbee.testing.tiny_gguf import tiny_gguf
from tests.integration.local_hub import LocalHub, Steps, serving

MODEL = tiny_gguf(elements=300_000)
REF = "hf:org/repo"
MIB = 1024 * 1024

PULL = """
import asyncio, sys
from pathlib import Path
from rbee.hive.models import ModelStore
from rbee.hive.sources.hub import HubSource
store = ModelStore(Path(sys.argv[1]), {"hub": HubSource(sys.argv[2], offline=False)})
model = asyncio.run(store.pull("hf:org/repo", lambda done, total: print("at", done, flush=True)))
print(model.path)
"""


def hub_of(model: bytes = MODEL) -> LocalHub:
    return LocalHub(files={"tiny-Q4_0.gguf": model})


def store_at(directory: Path, hub: LocalHub) -> ModelStore:
    return ModelStore(directory, {"hub": HubSource(hub.url, offline=False, pause_s=0.001)})


def files(directory: Path) -> list[str]:
    """Return the names of all files of a models directory but the locks."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path.name for path in found if path.parent.name != ".locks")


async def test_pulls_of_one_model_at_once_download_it_once(tmp_path: Path) -> None:
    """Two stores, as two hives of one machine have them, and several tasks of each."""
    async with serving(hub_of()) as hub:
        stores = [store_at(tmp_path, hub), store_at(tmp_path, hub)]
        models = await asyncio.gather(*(store.pull(REF) for store in stores for _ in range(3)))
        assert len(hub.downloads()) == 1
    assert {model.path.read_bytes() for model in models} == {MODEL}


async def test_pulls_by_two_processes_download_once(tmp_path: Path) -> None:
    async with serving(hub_of()) as hub:
        hub.hold = 1000
        command = [sys.executable, "-c", PULL, str(tmp_path), hub.url]
        first = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        await hub.held.wait()
        second = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert second.stdout is not None
        assert (await second.stdout.readline()).startswith(b"at ")  # it waits, and tells of the other's progress
        hub.go_on.set()
        (one, _), (two, _) = await asyncio.gather(first.communicate(), second.communicate())
        assert (first.returncode, second.returncode) == (0, 0)
        assert len(hub.downloads()) == 1
    path = one.splitlines()[-1]
    assert path == two.splitlines()[-1]
    with open(path, "rb") as file:  # noqa: ASYNC230
        assert file.read() == MODEL


async def test_pull_of_a_killed_process_is_gone_on_with_by_another(tmp_path: Path) -> None:
    async with serving(hub_of()) as hub:
        hub.hold = MIB // 2
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PULL, str(tmp_path), hub.url), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        while await process.stdout.readline() != b"at %d\n" % (MIB // 2):
            pass
        process.kill()
        await process.wait()
        hub.hold = None
        store = store_at(tmp_path, hub)
        await store.clean()
        assert (await store.pull(REF)).path.read_bytes() == MODEL
        assert hub.downloads() == [None, f"bytes={MIB // 2}-"]


async def test_no_more_than_four_models_are_downloaded_at_once_and_who_waits_is_told(tmp_path: Path) -> None:
    names = [f"Q{number}_0" for number in range(1, 7)]
    async with serving(LocalHub(files={f"tiny-{name}.gguf": MODEL for name in names})) as hub:
        hub.hold = 1000
        store = store_at(tmp_path, hub)
        begun = {name: asyncio.Event() for name in names}

        def begins(name: str) -> Steps:
            return Steps(lambda done: begun[name].set() if done else None)

        with captured_narration("hive") as sink:
            async with asyncio.TaskGroup() as group:
                for name in names[:4]:
                    group.create_task(store.pull(f"{REF}:{name}", begins(name)))
                await asyncio.gather(*(begun[name].wait() for name in names[:4]))
                for name in names[4:]:
                    group.create_task(store.pull(f"{REF}:{name}", begins(name)))
                again = group.create_task(store.pull(f"{REF}:{names[0]}"))
                async with asyncio.timeout(10):
                    while len(sink.events) < 2:  # noqa: ASYNC110  # nobody announces that it waits
                        await asyncio.sleep(0.01)
                assert len(hub.downloads()) == 4
                hub.go_on.set()
        assert [event["message"] for event in sink.events] == [
            f"{REF}:{name} waits: 4 other models are being downloaded to this hive." for name in names[4:]
        ]
        assert again.result().path.read_bytes() == MODEL
        assert [model.ref for model in store.list()] == [f"{REF}:{name}" for name in names]
        assert len(hub.downloads()) == 6


def hub_of_three(letters: str = "abc") -> LocalHub:
    return LocalHub(
        files={f"{letter}.gguf": tiny_gguf(elements=MIB // 4, salt=letter.encode()) for letter in letters}
    )


def limited(directory: Path, hub: LocalHub, files: float, spared: tuple[str, ...] = ()) -> ModelStore:
    """Make a store that may keep so many files of `hub_of_three`."""
    size = len(next(iter(hub.files.values())))
    source = HubSource(hub.url, offline=False, pause_s=0.001)
    return ModelStore(directory, {"hub": source}, max_bytes=int(files * size), spared=lambda: spared)


def ref_of(letter: str) -> str:
    return f"hf:org/repo:{letter}.gguf"


def held(store: ModelStore) -> str:
    """Return the letters of the models that are there."""
    return "".join(model.ref.removesuffix(".gguf")[-1] for model in store.list())


async def test_models_not_used_for_longest_make_room_and_that_is_told(tmp_path: Path) -> None:
    async with serving(hub_of_three()) as hub:
        store = limited(tmp_path, hub, 2.5)
        for letter in "ab":
            await store.pull(ref_of(letter))
        used = store.find(ref_of("a"))
        assert used is not None
        store.note_use(used)
        with captured_narration("hive") as sink:
            await store.pull(ref_of("c"))
        assert held(store) == "ac"
        assert [(event["action"], event["fields"]["evicted"]) for event in sink.events] == [
            ("hive_evict_model", ref_of("b"))
        ]


async def test_models_in_use_stay_and_what_does_not_fit_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    async with serving(hub_of_three()) as hub:
        store = limited(tmp_path, hub, 2.5, spared=(ref_of("a"), ref_of("b")))
        for letter in "ab":
            await store.pull(ref_of(letter))
        with pytest.raises(DownloadFailedError, match=r"models_max_bytes\).*a\.gguf, hf:org/repo:b\.gguf\."):
            await store.pull(ref_of("c"))
        assert held(store) == "ab"
        assert len(hub.downloads()) == 2


async def test_parts_of_downloads_make_room_before_models(tmp_path: Path) -> None:
    async with serving(hub_of_three()) as hub:
        store = limited(tmp_path, hub, 2.5)
        await store.pull(ref_of("a"))
        hub.hold = 900_000
        arrived = asyncio.Event()
        steps = Steps(lambda done: arrived.set() if done == hub.hold else None)
        pull = asyncio.create_task(store.pull(ref_of("b"), steps))
        await arrived.wait()
        pull.cancel()
        await asyncio.wait([pull])
        hub.hold = None
        assert [part.size_bytes for part in store.unusable()] == [900_000]
        await store.pull(ref_of("c"))
        assert held(store) == "ac"
        assert store.unusable() == []


async def test_two_pulls_at_once_that_fit_only_one_by_one_do_not_exceed_the_limit(tmp_path: Path) -> None:
    async with serving(hub_of_three()) as hub:
        store = limited(tmp_path, hub, 1.5)
        hub.hold = 1000
        first = asyncio.create_task(store.pull(ref_of("a")))
        await hub.held.wait()
        with pytest.raises(DownloadFailedError, match="does not fit"):
            await store.pull(ref_of("b"))
        hub.go_on.set()
        await first
        assert held(store) == "a"


async def test_waiting_pull_tells_how_far_the_other_one_is(tmp_path: Path) -> None:
    async with serving(hub_of()) as hub:
        hub.hold = 1000
        begun, moved = asyncio.Event(), asyncio.Event()
        first_steps = Steps(lambda done: begun.set() if done else None)
        first = asyncio.create_task(store_at(tmp_path, hub).pull(REF, first_steps))
        await begun.wait()
        steps = Steps(lambda done: moved.set())
        second = asyncio.create_task(store_at(tmp_path, hub).pull(REF, steps))
        await moved.wait()
        hub.go_on.set()
        assert await first == await second
        assert steps.seen[0][1] is None
        assert 0 < steps.seen[0][0] < len(MODEL)


async def test_waiting_pull_downloads_itself_when_the_other_one_is_cancelled(tmp_path: Path) -> None:
    async with serving(hub_of()) as hub:
        hub.hold = 1000
        first = asyncio.create_task(store_at(tmp_path, hub).pull(REF))
        await hub.held.wait()
        second = asyncio.create_task(store_at(tmp_path, hub).pull(REF))
        hub.hold = None
        first.cancel()
        assert (await second).path.read_bytes() == MODEL
        with pytest.raises(asyncio.CancelledError):
            await first
        assert len(hub.downloads()) == 2


async def test_directory_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    async with serving(hub_of()) as hub:
        with pytest.raises(DownloadFailedError, match="cannot be written: Not a directory"):
            await store_at(blocked / "models", hub).pull(REF)
        assert hub.requests == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 68 MiB, just above what a download leaves free."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=68m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let root mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


async def test_model_larger_than_the_disk_is_refused_before_it_is_fetched(small_disk: Path) -> None:
    model = tiny_gguf(elements=5 * MIB // 4)
    async with serving(hub_of(model)) as hub:
        with pytest.raises(DownloadFailedError, match=f"needs {len(model):,} bytes .* are free in") as refused:
            await store_at(small_disk, hub).pull(REF)
        assert str(small_disk) in refused.value.message
        assert hub.downloads() == []
    assert files(small_disk) == []


async def test_disk_that_fills_up_during_a_download_keeps_nothing_half_written(small_disk: Path) -> None:
    """The disk is filled once the first bytes are there; what others wrote stays."""
    model = tiny_gguf(elements=3 * MIB // 4)
    async with serving(hub_of(model)) as hub:
        hub.hold = 4096
        pull = asyncio.create_task(store_at(small_disk, hub).pull(REF))
        await hub.held.wait()
        with pytest.raises(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(MIB // 4))
        hub.go_on.set()
        with pytest.raises(DownloadFailedError, match="There is no space left on the disk of"):
            await pull
        (small_disk / "filler").unlink()
        assert files(small_disk) == []
        assert (await store_at(small_disk, hub).pull(REF)).path.read_bytes() == model
