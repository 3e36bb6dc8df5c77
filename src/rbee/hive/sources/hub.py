"""Models of a Hugging Face hub: listed, chosen and downloaded over HTTP, resumed where the connection breaks.

Endpoint, token and offline mode are those of `huggingface_hub` (HF_ENDPOINT, HF_TOKEN or its token file,
HF_HUB_OFFLINE). The bytes are fetched here, because its own download runs in a thread that nothing can stop.
"""

from __future__ import annotations

import asyncio
from urllib.parse import quote

import aiohttp
import msgspec
from huggingface_hub import constants
from msgspec import Struct
from yarl import URL

from rbee.contracts.models import ModelRef
from rbee.errors import DownloadFailedError, DownloadRefusedError, ModelNotFoundError, RbeeError
from rbee.hive.sources.hub_files import HubFile, choose_file
from rbee.hive.sources.part import Part, is_strong
from rbee.hive.sources.partial_file import CHUNK_BYTES, PartialFile, finish_in_thread
from rbee.hive.sources.source import Fetched, Progress
from rbee.narration import narrate, redact

CONNECT_S = 10.0
IDLE_S = 30.0
LIST_BYTES_MAX = 32 * 1024 * 1024
LIST_ATTEMPTS_MAX = 3
ATTEMPTS_MAX = 5
RESUMES_MAX = 200
PAUSE_S = 0.5
PAUSE_S_MAX = 8.0

_PASSING = {408, 429, 500, 502, 503, 504}


class _Lfs(Struct):
    sha256: str | None = None


class _Sibling(Struct):
    rfilename: str
    size: int | None = None
    lfs: _Lfs | None = None


class _Repository(Struct):
    siblings: list[_Sibling] = []
    sha: str | None = None


class _TryAgainError(Exception):
    """The hub failed in a way that may pass."""


class HubSource:
    """Fetches one .gguf file of a repository."""

    def __init__(
        self, endpoint: str | None = None, *, offline: bool | None = None, pause_s: float = PAUSE_S
    ) -> None:
        """Use the hub at `endpoint`, by default the one `huggingface_hub` is configured for.

        Args:
            endpoint: The hub's base URL.
            offline: Refuse to connect; by default what HF_HUB_OFFLINE says.
            pause_s: The first pause before trying again; each next one is twice as long, up to 8 s.
        """
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._offline = constants.is_offline_mode() if offline is None else offline
        self._pause_s = pause_s

    async def fetch(self, ref: ModelRef, into: PartialFile, progress: Progress) -> Fetched:
        """Choose the file that `ref` means and download it."""
        repo = ref.repo or ""
        if self._offline:
            raise DownloadRefusedError(
                f"{ref.text} is not here, and HF_HUB_OFFLINE forbids asking the hub.",
                remedy="Unset HF_HUB_OFFLINE for the hive, or name a model that is here (rbee models list).",
            )
        headers = await finish_in_thread(_headers)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=IDLE_S)
        async with aiohttp.ClientSession(
            headers=headers, timeout=timeout, trust_env=True, requote_redirect_url=False, read_bufsize=CHUNK_BYTES
        ) as session:
            exchange = _Exchange(session, self._endpoint, repo, self._pause_s)
            repository = await exchange.repository()
            files = [
                HubFile(name=f.rfilename, size_bytes=f.size, sha256=f.lfs.sha256 if f.lfs else None)
                for f in repository.siblings
            ]
            file = choose_file(repo, files, ref.quant)
            origin = f"{repo}/{file.name}"
            part = Part(ref=ref.text, origin=origin, size_bytes=file.size_bytes, sha256=file.sha256)
            await into.take_up(part, progress)
            if into.size_bytes:
                share = f" of {file.size_bytes / 1e6:.0f}" if file.size_bytes else ""
                said = f"{into.size_bytes / 1e6:.0f}{share} MB are here from an earlier download"
                narrate("model_download", f"Going on with {ref.text}: {said}.", resumed_bytes=into.size_bytes)
            if file.size_bytes is not None:
                await into.reserve(file.size_bytes)
            await exchange.download(file, repository.sha or constants.DEFAULT_REVISION, into, progress)
        return Fetched(origin=origin, sha256=file.sha256)


class _Exchange:
    """The requests about one repository."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: str, repo: str, pause_s: float) -> None:
        self._session = session
        self._endpoint = endpoint
        self._repo = repo
        self._pause_s = pause_s

    async def repository(self) -> _Repository:
        """Ask for the repository's files with sizes and digests, up to 3 times."""
        failed = 0
        while True:
            try:
                return await self._ask_repository()
            except (_TryAgainError, aiohttp.ClientError, TimeoutError) as error:
                failed += 1
                await self._pause(failed, LIST_ATTEMPTS_MAX, error)

    async def _ask_repository(self) -> _Repository:
        url = URL(f"{self._endpoint}/api/models/{self._repo}?blobs=true", encoded=True)
        async with asyncio.timeout(2 * IDLE_S), self._session.get(url) as response:
            self._check(response)
            body = bytearray()
            while data := await response.content.read(CHUNK_BYTES):
                body += data
                if len(body) > LIST_BYTES_MAX:
                    raise DownloadFailedError(f"The hub's list of the files of {self._repo} is too long.")
        try:
            return msgspec.json.decode(body, type=_Repository)
        except msgspec.MsgspecError:
            raise DownloadFailedError(
                f"{self._host()} answered with something else than the files of {self._repo}.",
                remedy="See that HF_ENDPOINT names a Hugging Face hub, and that no proxy answers in its place.",
            ) from None

    async def download(self, file: HubFile, revision: str, into: PartialFile, progress: Progress) -> None:
        """Fetch the file, going on from where a connection broke; up to 5 failures in a row without one byte."""
        path = f"{self._repo}/resolve/{quote(revision, safe='')}/{quote(file.name)}"
        url = URL(f"{self._endpoint}/{path}", encoded=True)
        if into.size_bytes and into.size_bytes == file.size_bytes:
            return
        failed = resumed = 0
        while True:
            before = into.size_bytes
            try:
                await self._download_once(url, file, into, progress)
                return
            except (_TryAgainError, aiohttp.ClientError, TimeoutError) as error:
                resumed += 1
                failed = 1 if into.size_bytes > before and resumed < RESUMES_MAX else failed + 1
                await self._pause(failed, ATTEMPTS_MAX, error)

    async def _download_once(self, url: URL, file: HubFile, into: PartialFile, progress: Progress) -> None:
        have = into.size_bytes
        etag = into.part.etag if into.part is not None else None
        async with self._session.get(url, headers=_part_headers(have, file, etag)) as response:
            if have and response.status == 416 and _total_bytes(response) == have:
                return  # it was whole already, and its size is known only now
            if have and not _continues(response, have, etag):
                await into.restart()
                if response.status != 200:
                    raise _TryAgainError("the hub did not take up the download where it broke")
            self._check(response)
            total = file.size_bytes or _total_bytes(response)
            if file.size_bytes is None and total is not None:
                await into.reserve(total)
            progress(into.size_bytes, total)
            while data := await response.content.read(CHUNK_BYTES):
                await into.append(data)
                if file.sha256 is None:
                    await into.note_etag(response.headers.get("ETag"))
                progress(into.size_bytes, total)
                if total is not None and into.size_bytes > total:
                    await into.restart()  # of no use to anybody
                    raise DownloadFailedError(f"{file.name} of {self._repo} is longer than its {total:,} bytes.")
        if total is not None and into.size_bytes < total:
            raise _TryAgainError(f"the connection ended after {into.size_bytes:,} of {total:,} bytes")

    async def _pause(self, failed: int, attempts_max: int, error: Exception) -> None:
        """Wait before the next attempt, longer each time.

        Raises:
            DownloadFailedError: There were enough attempts.
        """
        if failed >= attempts_max:
            raise DownloadFailedError(
                f"{self._host()} could not be reached for {self._repo}: {_words(error)}.",
                remedy="Check the network (and HF_ENDPOINT, if it is set), then try again; what came is kept.",
            ) from None
        await asyncio.sleep(min(self._pause_s * 2 ** (failed - 1), PAUSE_S_MAX))

    def _check(self, response: aiohttp.ClientResponse) -> None:
        elsewhere = response.url.host != self._host()  # a storage's refusal of an address that grew old
        if response.status in _PASSING or (response.status == 403 and elsewhere):
            raise _TryAgainError(f"the hub answered {response.status}")
        if response.status not in (200, 206):
            code = response.headers.get("X-Error-Code", "")
            has_token = "authorization" in self._session.headers
            raise explain_refusal(response.status, code, self._repo, has_token=has_token)

    def _host(self) -> str:
        return URL(self._endpoint).host or "The hub"


def explain_refusal(status: int, code: str, repo: str, *, has_token: bool) -> RbeeError:
    """Make the error for a hub's refusal.

    Args:
        status: The HTTP status.
        code: The hub's own word for it (`X-Error-Code`), or nothing.
        repo: The repository.
        has_token: Whether a token was sent. A hub answers 401 for an unknown repository where none was.
    """
    if code == "GatedRepo" or status == 403:
        return DownloadRefusedError(
            f"The repository {repo} is gated, and the hub does not give it to "
            + ("the user of this token (HF_TOKEN)." if has_token else "callers without a token (HF_TOKEN).")
        )
    if status == 401 and has_token and code != "RepoNotFound":
        return DownloadRefusedError(
            f"The hub does not accept the token (HF_TOKEN) for {repo}.",
            remedy="Set HF_TOKEN for the hive to a token that is valid, or unset it for public models.",
        )
    if status in (401, 404):
        return ModelNotFoundError(
            f"The hub has no repository or file {repo}, or keeps it private.",
            remedy="Check the spelling; for a private model set HF_TOKEN for the hive.",
            param="model",
        )
    return DownloadFailedError(f"The hub answered {status} for {repo}.")


def _part_headers(have: int, file: HubFile, etag: str | None) -> dict[str, str]:
    """Return what asks for the rest of a file.

    A file without an announced digest is asked for on the condition that it is still the same version; else the
    digest tells at the end, and two machines of a storage that name one file differently cost nothing.
    """
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if file.sha256 is None and is_strong(etag):
            headers["If-Range"] = str(etag)
    return headers


def _continues(response: aiohttp.ClientResponse, have: int, etag: str | None) -> bool:
    """Tell whether a response goes on from byte `have`, or is an error that leaves what is there of use.

    A part of another version than `etag` does not: some servers send one whatever they are asked.
    """
    if response.status == 206:
        is_same = etag is None or response.headers.get("ETag") == etag
        return is_same and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    return response.status not in (200, 416)


def _total_bytes(response: aiohttp.ClientResponse) -> int | None:
    if response.status in (206, 416):
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if total.isdigit() else None
    return response.content_length


def _headers() -> dict[str, str]:
    """Return the headers `huggingface_hub` would send; may ask for a token, so it belongs in a thread."""
    # Imported here: it takes a tenth of a second that most hives never need.
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return build_hf_headers(library_name="rbee")


def _words(error: Exception) -> str:
    text = str(error).strip() or "no answer in time"
    return redact(text.encode()).decode("utf-8", "replace")
