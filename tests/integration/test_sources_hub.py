"""Models of a hub, against a small one on loopback: chosen, resumed, checked, refused."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rbee.errors import (
    DownloadFailedError,
    DownloadRefusedError,
    InvalidRequestError,
    ModelInvalidError,
    ModelNotFoundError,
    RbeeError,
)
from rbee.hive.models import PARTS_KEPT_S, ModelStore
from rbee.hive.sources.hub import HubSource
from rbee.narration.emit import captured_narration
from rbee.testing.tiny_gguf import tiny_gguf
from tests.integration.local_hub import LocalHub, Steps, serving

MODEL = tiny_gguf(elements=600_000)
NAME = "tiny-Q4_K_M.gguf"
REF = "hf:org/repo:Q4_K_M"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep a token of the machine's user out of the tests."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
async def hub() -> AsyncIterator[LocalHub]:
    async with serving(LocalHub(files={"README.md": b"# Tiny", NAME: MODEL})) as hub:
        yield hub


@pytest.fixture
def store(hub: LocalHub, tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models", {"hub": HubSource(hub.url, offline=False, pause_s=0.001)})


def leftovers(tmp_path: Path) -> list[str]:
    """Return every file of the models directory but the locks."""
    models = tmp_path / "models"
    return sorted(
        str(path.relative_to(models))
        for path in models.rglob("*")
        if path.is_file() and ".locks" not in path.parts
    )


async def refused(store: ModelStore, tmp_path: Path, kind: type[RbeeError], ref: str = REF) -> RbeeError:
    """Pull, expect to be refused, and see that nothing stayed."""
    with pytest.raises(kind) as refusal:
        await store.pull(ref)
    assert leftovers(tmp_path) == []
    assert store.find(ref) is None
    return refusal.value


async def test_pull_brings_the_file_and_tells_how_far_it_is(
    hub: LocalHub, store: ModelStore, tmp_path: Path
) -> None:
    steps = Steps()
    model = await store.pull(REF, steps)
    assert model.path.read_bytes() == MODEL
    assert model.sha256 == hashlib.sha256(MODEL).hexdigest()
    assert model.ref == REF
    assert steps.seen[0] == (0, len(MODEL))
    assert steps.seen[-1] == (len(MODEL), len(MODEL))
    assert steps.seen == sorted(steps.seen)
    assert store.list() == [model]
    assert len(leftovers(tmp_path)) == 2


async def test_pull_again_asks_nobody(hub: LocalHub, store: ModelStore) -> None:
    first = await store.pull(REF)
    asked = len(hub.requests)
    assert await store.pull(REF) == first
    assert len(hub.requests) == asked


async def test_pull_without_quantization_takes_the_usual_one(hub: LocalHub, store: ModelStore) -> None:
    hub.files["tiny-Q8_0.gguf"] = tiny_gguf(salt=b"other")
    assert (await store.pull("hf:org/repo")).size_bytes == len(MODEL)


async def test_pull_of_a_file_in_a_folder_with_a_blank_finds_it(hub: LocalHub, store: ModelStore) -> None:
    hub.files["some folder/tiny-Q8_0.gguf"] = tiny_gguf(salt=b"other")
    model = await store.pull("hf:org/repo:Q8_0")
    assert model.path.read_bytes() == tiny_gguf(salt=b"other")


async def test_remove_takes_a_pulled_model_away(store: ModelStore, tmp_path: Path) -> None:
    await store.pull(REF)
    await store.remove(REF)
    assert store.find(REF) is None
    assert leftovers(tmp_path) == []


async def test_cut_connections_are_resumed_where_they_broke(hub: LocalHub, store: ModelStore) -> None:
    hub.cuts = [1_000_000, 500_000]
    model = await store.pull(REF)
    assert model.path.read_bytes() == MODEL
    starts = [int(part.removeprefix("bytes=").removesuffix("-")) for part in hub.downloads() if part]
    assert len(hub.downloads()) == 3
    assert hub.downloads()[0] is None
    assert 0 < starts[0] <= 1_000_000
    assert starts[0] < starts[1] <= 1_500_000


async def test_hub_that_ignores_ranges_is_begun_again(hub: LocalHub, store: ModelStore) -> None:
    hub.cuts = [1_000_000]
    hub.ignores_ranges = True
    assert (await store.pull(REF)).path.read_bytes() == MODEL


async def test_hub_that_fails_for_a_moment_is_asked_again(hub: LocalHub, store: ModelStore) -> None:
    hub.fail_once = [503, 429]
    assert (await store.pull(REF)).path.read_bytes() == MODEL


async def test_connection_that_always_breaks_fails_in_the_end(
    hub: LocalHub, store: ModelStore, tmp_path: Path
) -> None:
    hub.cuts = [0] * 50
    error = await refused(store, tmp_path, DownloadFailedError)
    assert error.retryable is True
    assert len(hub.downloads()) == 5


async def test_wrong_digest_is_refused_with_both(hub: LocalHub, store: ModelStore, tmp_path: Path) -> None:
    hub.digests[NAME] = "ab" * 32
    error = await refused(store, tmp_path, DownloadFailedError)
    assert "ab" * 32 in error.message
    assert hashlib.sha256(MODEL).hexdigest() in error.message


async def test_file_without_announced_digest_is_kept_with_its_own(hub: LocalHub, store: ModelStore) -> None:
    hub.digests[NAME] = None
    assert (await store.pull(REF)).sha256 == hashlib.sha256(MODEL).hexdigest()


async def test_file_that_is_no_model_is_refused(hub: LocalHub, store: ModelStore, tmp_path: Path) -> None:
    hub.files[NAME] = b"<html>" * 1000
    error = await refused(store, tmp_path, ModelInvalidError)
    assert "does not begin with the letters GGUF" in error.message


async def test_file_that_lacks_tensors_is_refused(hub: LocalHub, store: ModelStore, tmp_path: Path) -> None:
    hub.files[NAME] = MODEL[:-100]
    assert "is cut short" in (await refused(store, tmp_path, ModelInvalidError)).message


async def test_unknown_repository_is_not_found(store: ModelStore, tmp_path: Path) -> None:
    error = await refused(store, tmp_path, ModelNotFoundError, "hf:org/other")
    assert "org/other" in error.message


async def test_unknown_quantization_lists_what_there_is(store: ModelStore, tmp_path: Path) -> None:
    error = await refused(store, tmp_path, ModelNotFoundError, "hf:org/repo:Q2_K")
    assert f"It has {NAME}." in error.message


async def test_model_in_parts_is_not_supported(hub: LocalHub, store: ModelStore, tmp_path: Path) -> None:
    hub.files = {f"tiny-Q4_K_M-0000{part}-of-00002.gguf": MODEL for part in (1, 2)}
    assert "split into parts" in (await refused(store, tmp_path, InvalidRequestError)).message


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "GatedRepo", DownloadRefusedError),
        (401, "GatedRepo", DownloadRefusedError),
        (403, "", DownloadRefusedError),
        (401, "", ModelNotFoundError),
        (404, "RepoNotFound", ModelNotFoundError),
        (418, "", DownloadFailedError),
    ],
)
async def test_refusal_without_a_token_is_explained(
    hub: LocalHub, store: ModelStore, tmp_path: Path, status: int, code: str, kind: type[RbeeError]
) -> None:
    hub.refuse = (status, {"X-Error-Code": code} if code else {})
    error = await refused(store, tmp_path, kind)
    assert type(error) is kind
    assert len(hub.requests) == 1
    assert ("HF_TOKEN" in error.remedy) is (kind is not DownloadFailedError)


async def test_gated_repository_names_the_token_and_never_shows_it(
    hub: LocalHub, store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuse = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"no access for {TOKEN}"})
    error = await refused(store, tmp_path, DownloadRefusedError)
    assert hub.authorizations == [f"Bearer {TOKEN}"]
    assert "HF_TOKEN" in error.message
    assert TOKEN not in error.message + error.remedy
    assert error.retryable is False


async def test_refused_token_is_said_to_be(
    hub: LocalHub, store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuse = (401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    error = await refused(store, tmp_path, DownloadRefusedError)
    assert "does not accept the token" in error.message


async def test_token_is_sent_to_the_hub_and_not_to_its_storage(
    hub: LocalHub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    async with serving(LocalHub(files=hub.files)) as storage:
        hub.elsewhere = storage.url
        assert (await store.pull(REF)).path.read_bytes() == MODEL
        assert set(hub.authorizations) == {f"Bearer {TOKEN}"}
        assert storage.authorizations == [None]


async def test_offline_mode_asks_nobody(hub: LocalHub, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models", {"hub": HubSource(hub.url, offline=True)})
    error = await refused(store, tmp_path, DownloadRefusedError)
    assert "HF_HUB_OFFLINE" in error.message
    assert hub.requests == []


async def test_hub_that_is_not_there_cannot_be_reached(tmp_path: Path) -> None:
    async with serving(LocalHub()) as gone:
        url = gone.url
    store = ModelStore(tmp_path / "models", {"hub": HubSource(url, offline=False, pause_s=0.001)})
    error = await refused(store, tmp_path, DownloadFailedError)
    assert "127.0.0.1 could not be reached for org/repo" in error.message
    assert error.retryable is True


async def interrupted(hub: LocalHub, store: ModelStore, bytes_sent: int = 1_000_000) -> int:
    """Pull, cancel in the middle, and return how many bytes are kept."""
    hub.hold = bytes_sent
    arrived = asyncio.Event()
    pull = asyncio.create_task(store.pull(REF, Steps(lambda done: arrived.set() if done == bytes_sent else None)))
    await arrived.wait()
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    hub.hold = None
    hub.held.clear()
    [part] = store.unusable()
    return part.size_bytes


async def test_cancelled_pull_is_gone_on_with_where_it_was(
    hub: LocalHub, store: ModelStore, tmp_path: Path
) -> None:
    """What is kept is no model; the next pull asks for the rest alone, and the whole is checked."""
    assert await interrupted(hub, store) == 1_000_000
    assert store.list() == []
    steps = Steps()
    model = await store.pull(REF, steps)
    assert hub.downloads() == [None, "bytes=1000000-"]
    assert model.path.read_bytes() == MODEL
    assert model.sha256 == hashlib.sha256(MODEL).hexdigest()
    assert steps.seen[0] == (1_000_000, len(MODEL))
    assert store.unusable() == []
    assert len(leftovers(tmp_path)) == 2


async def test_going_on_is_told(hub: LocalHub, store: ModelStore) -> None:
    await interrupted(hub, store)
    with captured_narration("hive") as sink:
        await store.pull(REF)
    [line] = sink.events
    assert "1 of 2 MB are here from an earlier download" in line["message"]


async def test_pull_whose_connection_breaks_for_good_keeps_what_came(hub: LocalHub, store: ModelStore) -> None:
    await interrupted(hub, store)
    hub.cuts = [0] * 5
    with pytest.raises(DownloadFailedError):
        await store.pull(REF)
    assert [part.size_bytes for part in store.unusable()] == [1_000_000]
    assert (await store.pull(REF)).path.read_bytes() == MODEL
    assert hub.downloads()[1:] == ["bytes=1000000-"] * 6


async def test_what_came_stays_when_the_hub_cannot_be_asked_or_does_not_know_the_model(
    hub: LocalHub, store: ModelStore
) -> None:
    """A network that is away, or a token that was forgotten, costs nothing of it."""
    await interrupted(hub, store)
    for status, code in ((503, ""), (404, "RepoNotFound"), (403, "GatedRepo")):
        hub.refuse = (status, {"X-Error-Code": code})
        with pytest.raises(RbeeError):
            await store.pull(REF)
    assert [part.size_bytes for part in store.unusable()] == [1_000_000]
    hub.refuse = None
    assert (await store.pull(REF)).path.read_bytes() == MODEL
    assert hub.downloads() == [None, "bytes=1000000-"]


async def test_what_came_stays_when_going_on_is_cancelled_while_it_is_read_again(
    hub: LocalHub, store: ModelStore
) -> None:
    await interrupted(hub, store)
    pull: asyncio.Task[object]

    def stop(done_bytes: int) -> None:
        pull.cancel()

    pull = asyncio.create_task(store.pull(REF, Steps(stop)))
    await asyncio.wait([pull])
    assert pull.cancelled()
    assert [part.size_bytes for part in store.unusable()] == [1_000_000]
    assert len(hub.downloads()) == 1


async def test_file_that_has_changed_at_its_source_is_begun_anew(hub: LocalHub, store: ModelStore) -> None:
    await interrupted(hub, store)
    hub.files[NAME] = tiny_gguf(elements=600_000, salt=b"another version")
    model = await store.pull(REF)
    assert hub.downloads() == [None, None]
    assert model.path.read_bytes() == hub.files[NAME]


async def test_kept_part_that_was_damaged_is_refused_and_removed_at_the_end(
    hub: LocalHub, store: ModelStore, tmp_path: Path
) -> None:
    await interrupted(hub, store)
    [part] = (tmp_path / "models").glob(".partial/*/model.gguf")
    part.write_bytes(bytes(1_000_000))
    await refused(store, tmp_path, DownloadFailedError)
    assert (await store.pull(REF)).path.read_bytes() == MODEL


async def test_part_that_is_whole_already_is_checked_and_not_asked_for(hub: LocalHub, store: ModelStore) -> None:
    await interrupted(hub, store, len(MODEL))
    assert (await store.pull(REF)).path.read_bytes() == MODEL
    assert len(hub.downloads()) == 1


async def test_part_that_the_hub_calls_beyond_the_end_is_begun_anew(
    hub: LocalHub, store: ModelStore, tmp_path: Path
) -> None:
    """As where the file became shorter and the list does not tell its size."""
    hub.hides_sizes = True
    await interrupted(hub, store)
    hub.files[NAME] = tiny_gguf()
    hub.digests[NAME] = hashlib.sha256(MODEL).hexdigest()
    await refused(store, tmp_path, DownloadFailedError)
    assert hub.downloads() == [None, "bytes=1000000-", None]


async def test_part_of_unknown_size_that_is_whole_is_taken_as_it_is(hub: LocalHub, store: ModelStore) -> None:
    hub.hides_sizes = True
    await interrupted(hub, store, len(MODEL))
    assert (await store.pull(REF)).path.read_bytes() == MODEL
    assert hub.downloads() == [None, f"bytes={len(MODEL)}-"]


async def test_file_without_a_digest_is_gone_on_with_while_its_version_stays(
    hub: LocalHub, store: ModelStore
) -> None:
    hub.digests[NAME] = None
    hub.etag = '"one"'
    await interrupted(hub, store)
    assert (await store.pull(REF)).path.read_bytes() == MODEL
    assert hub.conditions == [None, '"one"']
    assert hub.downloads()[1] == "bytes=1000000-"


@pytest.mark.parametrize("ignores_conditions", [False, True])
async def test_file_without_a_digest_is_begun_anew_when_its_version_changes(
    hub: LocalHub, store: ModelStore, ignores_conditions: bool
) -> None:
    hub.ignores_conditions = ignores_conditions
    hub.digests[NAME] = None
    hub.etag = '"one"'
    await interrupted(hub, store)
    hub.etag = '"two"'
    hub.files[NAME] = tiny_gguf(elements=600_000, salt=b"another version")
    assert (await store.pull(REF)).path.read_bytes() == hub.files[NAME]


@pytest.mark.parametrize("etag", ["", 'W/"one"'])
async def test_file_without_digest_and_version_is_begun_anew(hub: LocalHub, store: ModelStore, etag: str) -> None:
    hub.digests[NAME] = None
    hub.etag = etag
    await interrupted(hub, store)
    assert (await store.pull(REF)).path.read_bytes() == MODEL
    assert hub.downloads() == [None, None]


async def test_remove_takes_away_what_a_download_left(hub: LocalHub, store: ModelStore, tmp_path: Path) -> None:
    await interrupted(hub, store)
    assert await store.remove(REF) == 1_000_000
    assert leftovers(tmp_path) == []
    with pytest.raises(ModelNotFoundError):
        await store.remove(REF)


async def test_pull_after_one_that_left_nothing_of_use_clears_up_and_downloads(
    store: ModelStore, tmp_path: Path
) -> None:
    whole = await store.pull(REF)
    left = tmp_path / "models" / ".partial" / whole.path.parent.name
    whole.path.parent.rename(left)
    (left / "model.gguf").write_bytes(MODEL[:1000])
    assert store.list() == []
    assert (await store.pull(REF)).path.read_bytes() == MODEL
    assert len(leftovers(tmp_path)) == 2


async def test_clean_removes_what_nobody_goes_on_with_and_spares_the_rest(hub: LocalHub, tmp_path: Path) -> None:
    """A part without a word what it is of goes at once, another one after a week; one under way stays."""
    clock = [time.time()]
    sources = {"hub": HubSource(hub.url, offline=False, pause_s=0.001)}
    store = ModelStore(tmp_path / "models", sources, now=lambda: clock[0])
    await interrupted(hub, store)
    left = tmp_path / "models" / ".partial" / "killed"
    left.mkdir()
    (left / "model.gguf").write_bytes(b"half")
    await store.clean()
    assert not left.exists()
    assert [part.model for part in store.unusable()] == [REF]
    clock[0] += PARTS_KEPT_S + 60
    hub.hold = 0
    pull = asyncio.create_task(store.pull(REF))
    await hub.held.wait()
    await store.clean()
    hub.go_on.set()
    assert (await pull).path.read_bytes() == MODEL
    hub.go_on.clear()
    await store.remove(REF)
    await interrupted(hub, store)
    clock[0] += PARTS_KEPT_S + 60
    await store.clean()
    assert leftovers(tmp_path) == []


async def test_remove_during_a_pull_is_refused_for_a_while(
    hub: LocalHub, store: ModelStore, tmp_path: Path
) -> None:
    first = await store.pull(REF)
    first.path.with_name("model.json").unlink()
    hub.hold = 1_000_000
    pull = asyncio.create_task(store.pull(REF))
    await hub.held.wait()
    with pytest.raises(RbeeError, match="is being downloaded"):
        await store.remove(REF)
    hub.go_on.set()
    await pull
    await store.remove(REF)
    assert leftovers(tmp_path) == []
