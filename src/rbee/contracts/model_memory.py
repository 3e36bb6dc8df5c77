"""How much memory a model takes, estimated from a few numbers about how it is built."""

from __future__ import annotations

from rbee.contracts.heartbeats import BATCH_TOKENS, PROCESS_BYTES, ModelMemory

_ACTIVATIONS = 16
_CACHED_BYTES = 2
_WORKING_BYTES = 4


def estimate_memory(
    *, weights_bytes: int, cached_numbers: int, vocabulary_size: int, embedding_length: int
) -> ModelMemory:
    """Estimate the memory a worker needs with a model, rather too high than too low.

    The cache of a token takes 2 bytes (f16) for each number that is kept of it;
    the work space: 4 bytes x 512 tokens of a batch x (vocabulary + 16 x embedding length), and 128 MiB for the
    process itself. What a GPU's driver keeps for each process is not in it.

    Args:
        weights_bytes: The size of the model's file.
        cached_numbers: What is kept of each token: the layers' kv heads together x (key + value length).
        vocabulary_size: Tokens the model knows.
        embedding_length: Numbers a token is between two layers.
    """
    return ModelMemory(
        weights_bytes=weights_bytes,
        cache_bytes_per_token=_CACHED_BYTES * cached_numbers,
        work_bytes=_WORKING_BYTES * BATCH_TOKENS * (vocabulary_size + _ACTIVATIONS * embedding_length)
        + PROCESS_BYTES,
    )
