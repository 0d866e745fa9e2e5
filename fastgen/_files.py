"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; renamed to ``path`` if the block ends well, removed otherwise.

    The data is on the disk before the name is: a reader, or a crash, sees the old file or the new one.

    Raises:
        OSError: the folder is missing or cannot be written to, or the disk is full.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:  # which names the temporary file, or none
        raise type(error)(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: as `atomic_path`.
    """
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(dict(tensors), temporary, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error


def cache_folder() -> Path:
    """Where files are kept that can be made again: ``$FASTGEN_CACHE``, or ``fastgen`` in ``$XDG_CACHE_HOME`` or
    ``~/.cache``; not created.
    """
    if folder := os.environ.get("FASTGEN_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgen"
