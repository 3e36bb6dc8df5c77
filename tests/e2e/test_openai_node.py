"""The routes by OpenAI's own client for node, asked once by `node/openai.mjs`; each test looks at one scene."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from rbee.testing import LocalStack
from tests.e2e.reading import MODEL, assert_whole

pytestmark = pytest.mark.asyncio(loop_scope="module")

HERE = Path(__file__).parent / "node"
CACHE = Path(__file__).parents[2] / ".cache" / "node"
FILES = ("package.json", "package-lock.json", "openai.mjs")
ALIAS = "my/fast:one"
RUN_S = 90.0
INSTALL_S = 100.0
Scenes = dict[str, Any]


def installed() -> Path:
    """Return a directory with the script and its client; made once for each version of the files.

    It is made aside and moved into place, for several test processes may look at once.
    """
    npm = shutil.which("npm")
    if shutil.which("node") is None or npm is None:
        pytest.skip("node and npm are not installed here")
    content = b"".join((HERE / name).read_bytes() for name in FILES)
    place = CACHE / hashlib.sha256(content).hexdigest()[:16]
    if not place.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=CACHE))
        try:
            for name in FILES:
                shutil.copy(HERE / name, made)
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--cache", str(CACHE / "npm")]
            subprocess.run(command, cwd=made, check=True, timeout=INSTALL_S, stdout=subprocess.DEVNULL)
            with contextlib.suppress(OSError):  # another process was first
                made.rename(place)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return place


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scenes(api_stack: LocalStack) -> Scenes:
    """Run the script, and return what it printed."""
    place = await asyncio.to_thread(installed)
    process = await asyncio.create_subprocess_exec(
        *("node", "openai.mjs", f"{api_stack.url}/v1", MODEL, ALIAS),
        cwd=place,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(RUN_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    found: Scenes = json.loads(out)
    return found


async def test_call_is_answered_whole_under_the_name_asked_with(scenes: Scenes) -> None:
    """Text and usage; the request's id is its job's."""
    whole = scenes["whole"]
    assert whole["model"] == ALIAS
    assert whole["text"]
    assert whole["usage"]["completion_tokens"] == 5
    assert whole["request_id"] == whole["job_id"]


async def test_two_answers_are_streamed_with_one_usage(scenes: Scenes) -> None:
    """Told last, and counting both."""
    streamed = scenes["streamed"]
    assert streamed["indexes"] == [0, 1]
    [usage] = streamed["usages"]
    assert usage["completion_tokens"] == 10
    assert streamed["is_usage_last"] is True


async def test_stream_helper_puts_the_answer_together(scenes: Scenes) -> None:
    """The client's own accumulation ends with a whole completion."""
    assert scenes["helped"]["text"]
    assert scenes["helped"]["reason"] == "length"


async def test_answer_by_a_schema_is_json_of_it(scenes: Scenes) -> None:
    """One boolean, and nothing else."""
    assert list(scenes["schema"]) == ["cold"]
    assert isinstance(scenes["schema"]["cold"], bool)


async def test_several_prompts_are_streamed_in_whole_chunks(scenes: Scenes) -> None:
    """None of them null."""
    assert scenes["completions"] == {"are_whole": True}


async def test_vectors_are_unpacked_and_shortened(scenes: Scenes) -> None:
    """The client asks for base64 by itself."""
    assert (scenes["embeddings"]["widths"], scenes["embeddings"]["short"]) == ([576, 576], 8)
    assert scenes["embeddings"]["usage"]["prompt_tokens"] > 0


async def test_responses_are_created_and_streamed(scenes: Scenes) -> None:
    """The client's own accumulation is the sum of the numbered pieces."""
    found = scenes["responses"]
    assert found["model"] == ALIAS
    assert found["text"]
    assert found["numbers"] == list(range(len(found["numbers"])))
    assert found["streamed"] == "".join(found["deltas"]) != ""


async def test_models_are_listed_and_retrieved(scenes: Scenes) -> None:
    """By a name with a slash and a colon, too."""
    assert sorted(scenes["models"]["ids"]) == [ALIAS, MODEL]
    assert (scenes["models"]["one"], scenes["models"]["alias_of"]) == (ALIAS, MODEL)


async def test_errors_are_those_the_client_expects(scenes: Scenes) -> None:
    """Its own classes, with code and the request's id."""
    assert scenes["errors"] == {
        "unknown": ["NotFoundError", 404, "model_not_found", True],
        "empty": ["BadRequestError", 400, "invalid", True],
        "long": ["BadRequestError", 400, "context_length_exceeded", True],
    }


async def test_caller_that_leaves_cancels_its_job(api_stack: LocalStack, scenes: Scenes) -> None:
    """A stream left after its first piece, and a whole answer that was given up."""
    assert scenes["given_up"] == {"error": "APIConnectionTimeoutError"}
    async with api_stack.client() as client:
        [given_up] = (await client.jobs(correlation_id="given-up-node")).data
    for job_id in (scenes["left"]["job_id"], given_up.job_id):
        events = await api_stack.log(job_id)
        assert_whole(events)
        assert (events[-1]["state"], events[-1]["reason"]) == ("cancelled", "user")
