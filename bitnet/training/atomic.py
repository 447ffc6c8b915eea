"""Checkpoints that exist whole or not at all: temporary file in the same folder, fsync, rename, fsync of the folder."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from bitnet.errors import UserError

PARTIAL_SUFFIX = ".partial"


def write_atomically(content: Any, path: Path) -> None:
    """``torch.save`` to ``path``; whatever stops the process, ``path`` holds the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path}: the checkpoint cannot be written ({error.strerror}); the previous one is intact."
        ) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_partial_files(folder: Path) -> list[Path]:
    """Delete what an interrupted save left behind; call it while nothing else writes there."""
    stale = sorted(folder.glob(f".*{PARTIAL_SUFFIX}"))
    for file in stale:
        file.unlink(missing_ok=True)
    return stale


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written by ``write_atomically`` and read with ``weights_only=True``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write_atomically(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only=True)
