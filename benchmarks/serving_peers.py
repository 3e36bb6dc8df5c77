"""The peers that serve models: how each is installed, configured and started."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers.install import PeersMissingError, peers_python
from benchmarks.pipeline_stage import free_port
from benchmarks.serving_client import Target, post, until_ready
from benchmarks.serving_engine import CONTEXT_TOKENS, SLOTS
from benchmarks.serving_sides import Engines, Plane, Side, engine_command, listening, local
from rbee.worker.engines.llama_cpp import BATCH_TOKENS

_HERE = Path(__file__).parent / "peers"
_MODEL = "demo"


def python_of(name: str) -> Path:
    """Return the interpreter of a peer; installs it when it is not there.

    Raises:
        PeersMissingError: It could not be installed; the message has pip's own reason.
    """
    try:
        return peers_python(name)
    except PeersMissingError as error:
        said = getattr(error.__cause__, "stderr", None) or b""
        lines = [line for line in said.decode("utf-8", "replace").splitlines() if "ERROR" in line]
        raise PeersMissingError(f"{error} {lines[-1] if lines else error.__cause__}") from error


def versions(name: str, *packages: str) -> str:
    """Return the exact versions of a peer's packages."""
    lines = (_HERE / f"{name}.txt").read_text("utf-8").split()
    return ", ".join(line.replace("==", " ") for line in lines if line.partition("==")[0] in packages)


def _environment(home: str, more: Mapping[str, str]) -> dict[str, str]:
    """Return what a peer is started with: what it writes for its user stays in a directory of ours."""
    return {**os.environ, "HOME": home, **more}


@asynccontextmanager
async def litellm(engines: Engines, upstream: Target) -> AsyncIterator[Plane]:
    """Run the LiteLLM proxy before an engine: one process, no key, no database, its list of prices from disk."""
    python, port = await asyncio.to_thread(python_of, "litellm"), free_port()
    config = {
        "model_list": [
            {
                "model_name": _MODEL,
                "litellm_params": {
                    "model": f"openai/{upstream.model}",
                    "api_base": f"{upstream.url}/v1",
                    "api_key": "none",
                },
            }
        ],
    }
    told = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as name:
        path = Path(name) / "config.yaml"
        path.write_text(json.dumps(config), "utf-8")  # YAML takes it
        command = [
            str(python.parent / "litellm"),
            "--config",
            str(path),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        ready = "/health/readiness"
        async with listening(command, Target(local(port), _MODEL), ready, env=_environment(name, told)) as plane:
            yield plane


@asynccontextmanager
async def ray_serve(engines: Engines, upstream: Target) -> AsyncIterator[Plane]:
    """Run Ray Serve with its defaults; it says 503 until something is deployed, which counts as ready."""
    python, port, engine_port = await asyncio.to_thread(python_of, "ray_serve"), free_port(), free_port()
    target = Target(local(port), "any")
    told = {
        "BENCH_ENGINE": json.dumps(engine_command(engines.model, engine_port)),
        "BENCH_ENGINE_URL": local(engine_port),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }

    async def launch(process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGUSR1)
        await until_ready(target.url, "/", lambda: process.poll() is None)

    with tempfile.TemporaryDirectory(prefix="rbee-ray-") as name:
        command = [str(python), str(_HERE / "ray_serve_app.py"), str(port), name]
        env = _environment(name, told)
        async with listening(command, target, "/-/healthz", env=env, launch=launch, status="503") as plane:
            yield plane


def _registered(engines: Engines) -> dict[str, Any]:
    """Return what Xinference is told of the model; without a template it takes the file's own."""
    spec = {
        "model_format": "ggufv2",
        "model_size_in_billions": 1,
        "quantization": "Q4_1",
        "model_file_name_template": engines.model.name,
        "model_uri": str(engines.model.parent),
    }
    return {
        "version": 2,
        "context_length": SLOTS * CONTEXT_TOKENS,
        "model_name": _MODEL,
        "model_lang": ["en"],
        "model_ability": ["chat"],
        "model_family": _MODEL,
        "chat_template": "",
        "model_specs": [spec],
    }


_LAUNCHED = {
    "model_uid": _MODEL,
    "model_name": _MODEL,
    "model_type": "LLM",
    "model_engine": "llama.cpp",
    "model_format": "ggufv2",
    "model_size_in_billions": 1,
    "quantization": "Q4_1",
    # To its engine, as a worker's has it:
    "n_ctx": SLOTS * CONTEXT_TOKENS,
    "n_parallel": SLOTS,
    "kv_unified": False,
    "n_batch": BATCH_TOKENS,
    "n_ubatch": BATCH_TOKENS,
}


@asynccontextmanager
async def xinference(engines: Engines, upstream: Target) -> AsyncIterator[Plane]:
    """Run Xinference, which loads the same file with the same engine; its computing threads sleep as ours do."""
    python, port = await asyncio.to_thread(python_of, "xinference"), free_port()
    target = Target(local(port), _MODEL)

    async def launch(process: subprocess.Popen[bytes]) -> None:
        model = {"model": json.dumps(_registered(engines)), "persist": False}
        await post(target.url, "/v1/model_registrations/LLM", model)
        await post(target.url, "/v1/models", _LAUNCHED)

    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as name:
        told = {
            "XINFERENCE_HOME": name,
            "XINFERENCE_AUTH_ADVANCED": "false",
            "XINFERENCE_ENABLE_VIRTUAL_ENV": "0",
            "OMP_WAIT_POLICY": "passive",
        }
        command = [str(python.parent / "xinference-local"), "--host", "127.0.0.1", "--port", str(port)]
        env = _environment(name, told)
        async with listening(command, target, "/status", env=env, launch=launch) as plane:
            yield plane


LITELLM = Side("LiteLLM proxy", litellm, litellm, starts=2)
RAY_SERVE = Side("Ray Serve", ray_serve, starts=2, has_launch=True)
XINFERENCE = Side("Xinference", xinference, has_launch=True)
