"""llama.cpp in this process, through xllamacpp: its C++ server answers on a unix socket of the worker's own.

The server is never torn down: that waits for what it generates, half a minute at worst. The process ends instead.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from msgspec import Struct

from rbee.errors import ModelInvalidError, StartError
from rbee.worker.engines import EngineAddress
from rbee.worker.engines.socket_place import socket_place
from rbee.worker.engines.stderr_tail import stderr_since, stderr_size

GGUF_MAGIC = b"GGUF"
# A caller that leaves is noticed between two batches, so they are kept short.
BATCH_TOKENS = 512
PROMPT_CACHE_MIB = 256
_HEADER_BYTES = 1024 * 1024
_MEMORY = re.compile(
    r"bad_alloc|out of memory|failed to allocate|unable to allocate|cannot allocate memory|"
    r"insufficient memory|failed to create (?:llama_)?context",
    re.IGNORECASE,
)
# The last line of its complaint is the cause.
_TEMPLATE = re.compile(
    r"chat_templates_init: error: (.*)|chat template parsing error: (?:.*\nError: )?(.*)", re.DOTALL
)
_COMPLAINT = re.compile(r"^[\d.]+ E (.*)$", re.MULTILINE)


class EngineOptions(Struct, frozen=True, kw_only=True):
    """What to load and how.

    Attributes:
        directory: The worker's own directory (0700); the engine's socket goes there.
        context_tokens: Per request.
        gpu_layers: -1 lets the engine fit the model to the free device memory.
        threads: 0 leaves the number to the engine.
    """

    model: Path
    alias: str
    directory: Path
    slots: int
    context_tokens: int
    gpu_layers: int = -1
    threads: int = 0
    embedding: bool = False
    reranking: bool = False


def _xllamacpp() -> Any:
    """Import the engine, with computing threads that sleep while they wait for one another.

    Its OpenMP threads spin by default. With anything else to do for the machine that costs nearly everything:
    two threads on two busy cores made 2 to 12 tokens/s spinning and 50 to 90 sleeping. What the user set stands.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import xllamacpp

    return xllamacpp


class LlamaCpp:
    """One model in llama.cpp's own server."""

    name = "llama_cpp"
    holds_threads = True

    def __init__(self, options: EngineOptions) -> None:
        """Take what to load; nothing is touched before `load`."""
        self._options = options
        self._server: Any = None

    @property
    def version(self) -> str:
        """The version of xllamacpp."""
        return str(_xllamacpp().__version__)

    def load(self) -> EngineAddress:
        """Load the model; blocks every thread of the process (the engine keeps Python's lock meanwhile)."""
        xllamacpp = _xllamacpp()
        check_model_file(self._options.model)
        socket_path, key = socket_place(self._options.directory), secrets.token_hex(32)
        parameters = self._parameters(xllamacpp)
        parameters.hostnames = [socket_path]
        parameters.api_keys = [key]
        said_before = stderr_size()
        try:
            self._server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            if not os.path.exists(socket_path):
                raise StartError(f"The engine cannot listen on a socket in {self._options.directory}.") from error
            raise ModelInvalidError(why_not_loaded(stderr_since(said_before))) from error
        return EngineAddress(socket_path, key)

    def kill(self) -> None:
        """Do nothing: it runs in this process."""

    def _parameters(self, xllamacpp: Any) -> Any:
        options = self._options
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(options.model)
        parameters.model_alias = {options.alias}
        parameters.port = 0
        parameters.n_parallel = options.slots
        parameters.kv_unified = False  # so that the context is shared out evenly: each slot has its own
        parameters.n_ctx = options.slots * options.context_tokens
        parameters.n_batch = parameters.n_ubatch = BATCH_TOKENS
        parameters.n_gpu_layers = options.gpu_layers
        # Fitting loads the model's outline a second time, and changes nothing where there is no GPU.
        parameters.fit_params = options.gpu_layers == -1 and _has_gpu(xllamacpp)
        parameters.cache_ram_mib = PROMPT_CACHE_MIB
        parameters.sse_ping_interval = -1
        parameters.cors_origins = ""
        parameters.ui = False
        parameters.endpoint_slots = False
        parameters.offline = True
        parameters.verbosity = 1
        if options.threads:
            parameters.cpuparams.n_threads = options.threads
            parameters.cpuparams_batch.n_threads = options.threads
        if options.embedding or options.reranking:
            self._set_pooling(parameters, xllamacpp.llama_pooling_type)
        return parameters

    def _set_pooling(self, parameters: Any, pooling: Any) -> None:
        options = self._options
        parameters.embedding = True
        # With a context for each slot, the longer of two inputs that are embedded together is cut where the
        # shorter one ends, and its vector is that of its rest.
        parameters.kv_unified = True
        # An input is embedded in one piece, so a batch has to hold it.
        parameters.n_batch = parameters.n_ubatch = max(BATCH_TOKENS, options.context_tokens)
        if options.reranking:
            parameters.pooling_type = pooling.LLAMA_POOLING_TYPE_RANK
        elif not names_pooling(options.model):
            parameters.pooling_type = pooling.LLAMA_POOLING_TYPE_MEAN


def check_model_file(path: Path) -> None:
    """Refuse what is plainly no model, with the sentence that is true.

    Raises:
        ModelInvalidError: The file is missing, cannot be read, or is no GGUF file.
    """
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ModelInvalidError(f"{path} is not a file.")
            magic = file.read(len(GGUF_MAGIC))
    except FileNotFoundError:
        raise ModelInvalidError(
            f"There is no model file at {path}.", remedy="Pull the model again, or name another file."
        ) from None
    except OSError as error:
        raise ModelInvalidError(f"The model file {path} cannot be read: {error.strerror or error}.") from error
    if magic != GGUF_MAGIC:
        raise ModelInvalidError(f"{path} is not a GGUF model file.")


def names_pooling(path: Path) -> bool:
    """Tell whether the model's header says how its embeddings are pooled (`<architecture>.pooling_type`).

    The architecture's keys stand before the long lists of the tokenizer, so the first MiB has them.
    """
    with path.open("rb") as file:
        return b".pooling_type" in file.read(_HEADER_BYTES)


def why_not_loaded(engine_words: str) -> str:
    """Make one plain sentence of what the engine said before it gave up."""
    if _MEMORY.search(engine_words):
        return "The model cannot be loaded: the memory does not suffice for it and its context."
    template = _TEMPLATE.search(engine_words)
    if template is not None:
        said = (template[1] or template[2] or "").partition("\n")[0].strip().rstrip(".")[:300]
        return f"The model cannot be loaded: the chat template in its file cannot be used ({said})."
    complaint = _COMPLAINT.search(engine_words)
    if complaint is None:
        return "The model cannot be loaded; the engine's own words stand on the worker's stderr."
    said = complaint[1].strip().rstrip(".")[:300]
    return f"The model cannot be loaded: the file is damaged or not one for this engine ({said})."


def _has_gpu(xllamacpp: Any) -> bool:
    kinds = xllamacpp.ggml_backend_dev_type
    gpus = {kinds.GGML_BACKEND_DEVICE_TYPE_GPU, kinds.GGML_BACKEND_DEVICE_TYPE_IGPU}
    return any(device["type"] in gpus for device in xllamacpp.get_device_info())
