"""Read what a GGUF model file says about itself, and estimate the memory it needs."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from rbee.contracts.heartbeats import ModelMemory, Purpose
from rbee.contracts.model_memory import estimate_memory
from rbee.errors import ModelInvalidError
from rbee.hive.gguf_reader import GgufReader
from rbee.hive.gguf_types import FILE_TYPES

LAYERS_MAX = 4096

POOLING_RANK = 4
EMBEDDING_ARCHITECTURES = frozenset(
    {
        *("bert", "eurobert", "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2"),
        *("jina-bert-v3", "gemma-embedding", "llama-embed", "t5encoder"),
    }
)
"""Architectures, in the engine's words, that do not write but turn text into numbers."""

_MIB = 1024 * 1024


class GgufHeader(Struct, frozen=True, kw_only=True):
    """What a model file says about itself.

    Attributes:
        version: The version of the GGUF format.
        architecture: The engine's word for how the model is built, such as `llama`.
        name: The model's own name, where it has one.
        file_type: How most weights are quantized, such as `Q4_K_M`; `unknown` when it is not said.
        context_length: Tokens the model was trained to look at; 0 when it is not said.
        block_count: Layers; 0 when it is not said.
        embedding_length: Numbers a token is between two layers.
        head_count: Attention heads of a layer, the most of any.
        kv_heads: Heads that are cached, layer by layer.
        key_length: Numbers of a cached key, a token and head.
        value_length: Numbers of a cached value, a token and head.
        vocabulary_size: Tokens the model knows.
        has_chat_template: Whether the file says how a conversation is written.
        pooling_type: How it makes one vector of many, 0 for not at all, 4 for a rank; None when it is not said.
        tensor_count: Tensors in the file.
        file_size_bytes: Size of the file, which was checked to hold every tensor.
    """

    version: int
    architecture: str
    name: str | None
    file_type: str
    context_length: int
    block_count: int
    embedding_length: int
    head_count: int
    kv_heads: tuple[int, ...]
    key_length: int
    value_length: int
    vocabulary_size: int
    has_chat_template: bool
    pooling_type: int | None
    tensor_count: int
    file_size_bytes: int


class ModelFacts(Struct, frozen=True, kw_only=True):
    """What is told of a model file, read from its header once."""

    architecture: str
    quantization: str
    context_tokens: int | None
    has_chat_template: bool
    purpose: Purpose
    memory: ModelMemory


def facts_of(header: GgufHeader) -> ModelFacts:
    """Return what is told of a model file."""
    return ModelFacts(
        architecture=header.architecture,
        quantization=header.file_type,
        context_tokens=header.context_length or None,
        has_chat_template=header.has_chat_template,
        purpose=purpose_of(header),
        memory=memory_of(header),
    )


def purpose_of(header: GgufHeader) -> Purpose:
    """Tell what a model is made for: a rank makes a reranker, any other pooling, or a BERT, an embedder."""
    if header.pooling_type == POOLING_RANK:
        return "rerank"
    if header.pooling_type or header.architecture in EMBEDDING_ARCHITECTURES:
        return "embed"
    return "generate"


def read_header(path: Path) -> GgufHeader:
    """Read and check a model file's header; blocks for some tenths of a second on a large vocabulary.

    Raises:
        ModelInvalidError: It is no GGUF file, is damaged or cut short, or cannot be opened.
    """
    try:
        with path.open("rb", buffering=_MIB) as file:
            size = file.seek(0, 2)
            file.seek(0)
            reader = GgufReader(file, size, path.name)
            reader.read()
    except OSError as error:
        raise ModelInvalidError(f"The model file {path} cannot be read: {error.strerror or error}.") from error
    return _Facts(reader).header(size)


def memory_of(header: GgufHeader) -> ModelMemory:
    """Estimate the memory a worker needs with this model (see `estimate_memory`).

    One that only turns text into numbers makes none for each token that it knows.
    """
    return estimate_memory(
        weights_bytes=header.file_size_bytes,
        cached_numbers=sum(header.kv_heads) * (header.key_length + header.value_length),
        vocabulary_size=0 if header.architecture in EMBEDDING_ARCHITECTURES else header.vocabulary_size,
        embedding_length=header.embedding_length,
    )


class _Facts:
    """Looks up what is needed among a header's values, and refuses what cannot be."""

    def __init__(self, reader: GgufReader) -> None:
        self._reader = reader
        architecture = reader.values.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            raise reader.invalid("does not say which architecture its model has")
        self._architecture = architecture

    def header(self, file_size_bytes: int) -> GgufHeader:
        """Put the facts together."""
        values, lengths = self._reader.values, self._reader.lengths
        name = values.get("general.name")
        layers = self._number("block_count")
        if layers > LAYERS_MAX:
            raise self._reader.invalid(f"is damaged: it claims {layers:,} layers")
        width = self._number("embedding_length")
        heads = self._by_layer("attention.head_count", layers, 0)
        head_length = width // max(heads) if any(heads) else 0
        return GgufHeader(
            version=self._reader.version,
            architecture=self._architecture,
            name=name if isinstance(name, str) else None,
            file_type=_file_type_name(values.get("general.file_type")),
            context_length=self._number("context_length"),
            block_count=layers,
            embedding_length=width,
            head_count=max(heads, default=0),
            kv_heads=self._by_layer("attention.head_count_kv", layers, max(heads, default=0)),
            key_length=self._number("attention.key_length", head_length),
            value_length=self._number("attention.value_length", head_length),
            vocabulary_size=lengths.get("tokenizer.ggml.tokens", 0) or self._number("vocab_size"),
            has_chat_template="tokenizer.chat_template" in values,
            pooling_type=self._number("pooling_type") if self._says("pooling_type") else None,
            tensor_count=self._reader.tensor_count,
            file_size_bytes=file_size_bytes,
        )

    def _says(self, key: str) -> bool:
        return f"{self._architecture}.{key}" in self._reader.values

    def _number(self, key: str, default: int = 0) -> int:
        return self._checked(key, self._reader.values.get(f"{self._architecture}.{key}", default))

    def _by_layer(self, key: str, layers: int, default: int) -> tuple[int, ...]:
        """Return a number a layer, whether the file gives one for all or a list."""
        value = self._reader.values.get(f"{self._architecture}.{key}", default)
        if isinstance(value, list):
            return tuple(self._checked(key, number) for number in value)
        return (self._checked(key, value),) * layers

    def _checked(self, key: str, value: object) -> int:
        if not isinstance(value, int) or value < 0:
            raise self._reader.invalid(f"is damaged: its {key} is {value!r}")
        return value


def _file_type_name(number: object) -> str:
    if not isinstance(number, int):
        return "unknown"
    return FILE_TYPES.get(number, f"type {number}")
