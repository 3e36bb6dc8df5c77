"""The environment a child is given: an allow-list, so that no secret of ours travels by accident."""

from __future__ import annotations

import os
from collections.abc import Mapping

_NAMES = frozenset(
    {
        "HOME",
        "LANG",
        "LANGUAGE",
        "LD_LIBRARY_PATH",
        "LOGNAME",
        "PATH",
        "PYTHONPATH",
        "SSL_CERT_DIR",
        "SSL_CERT_FILE",
        "TEMP",
        "TMP",
        "TMPDIR",
        "TZ",
        "USER",
        "VIRTUAL_ENV",
    }
)
_PREFIXES = ("CUDA_", "GGML_", "GPU_", "HIP_", "HSA_", "KMP_", "LC_", "MKL_", "NVIDIA_", "OMP_", "ROCR_", "XDG_")


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return a child's whole environment: what is harmless and useful of ours, then `extra`.

    Python children write unbuffered (`PYTHONUNBUFFERED=1`), or what they said last would die with them.
    """
    kept = {name: value for name, value in os.environ.items() if name in _NAMES or name.startswith(_PREFIXES)}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}
