"""Models named by the path of their file: used where they are, never copied, never removed."""

from __future__ import annotations

from pathlib import Path

from rbee.errors import ConflictError, ModelInvalidError, ModelNotFoundError
from rbee.hive.gguf_reader import MAGIC


def local_file_size(path: Path) -> int:
    """Return the size in bytes of a model file that somebody named by its path, after a first look at it.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelInvalidError: It is no file, cannot be read, or does not begin like a GGUF file.
    """
    try:
        if not path.is_file():
            raise _missing(path)
        with path.open("rb") as file:
            begins = file.read(len(MAGIC))
            size = file.seek(0, 2)
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError) as error:
        raise ModelInvalidError(
            f"The model file {path} cannot be read: {getattr(error, 'strerror', None) or error}.",
            remedy="See that the hive's user may read the file.",
        ) from error
    if begins != MAGIC:
        raise ModelInvalidError(
            f"{path} is no GGUF file: it does not begin with the letters GGUF.",
            remedy="Name the path of a .gguf file.",
        )
    return size


def refuse_removal(path: Path) -> ConflictError:
    """Make the error for a wish to remove a file that was never ours."""
    return ConflictError(
        f"{path} is used where it is and does not belong to rbee, so it is not removed.",
        remedy="Delete the file yourself if you want it gone.",
    )


def _missing(path: Path) -> ModelNotFoundError:
    what = "is a directory" if path.is_dir() else "is not there, or is no file"
    return ModelNotFoundError(
        f"The model file {path} {what}.",
        remedy="Name the path of a .gguf file on the hive's machine.",
        param="model",
    )
