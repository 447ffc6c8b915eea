"""Checkpoints that exist whole or not at all: temporary file in the same folder, fsync, rename, fsync of the folder."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from bitnet.errors import DISK_FULL, UserError
from bitnet.replacing import PARTIAL_SUFFIX, replacing

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


def write_atomically(content: Any, path: Path, previous: Path | None = None) -> None:
    """``torch.save`` to ``path``; whatever stops the process, ``path`` holds the old content or the new one.

    The old content gets the name ``previous``, where there is one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            with partial.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                _name_also(path, previous)
            elif path.is_dir():  # of parts
                shutil.rmtree(path)
    except (OSError, RuntimeError) as error:
        why = error if isinstance(error, OSError) else error.__context__  # torch trips over what the system said
        if not isinstance(why, OSError):
            raise
        what = "the disk is full" if why.errno in DISK_FULL else "it cannot be written"
        left = "the one from before is intact" if path.is_file() else "none has been saved yet"
        raise UserError(f"{path}: {what} ({why.strerror}); {left}.") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text_atomically(text: str, path: Path) -> None:
    """A small file that is replaced as a whole, or not at all on a disk that is full."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def copy_atomically(path: Path, other: Path) -> None:
    """The file at ``path`` a second time, as ``other``: whole, or not at all."""
    with replacing(other) as partial:
        shutil.copyfile(path, partial)


def _name_also(path: Path, other: Path) -> None:
    """Let ``other`` be a second name of the checkpoint at ``path``, in place of what it named before.

    ``path`` itself goes on existing. A folder cannot have two names, nor can files everywhere: then it is moved, and
    until the new one takes its place ``other`` is the only one.
    """
    link = other.with_name(f".{other.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:
        move_over(path, other)
        return
    move_over(link, other)
    link.unlink(missing_ok=True)  # renaming one name of a file to another of the same file does nothing


def move_over(path: Path, other: Path) -> None:
    """Rename ``path`` to ``other``, a file or a folder that is deleted if it is there."""
    if other.is_dir():
        shutil.rmtree(other)
    os.replace(path, other)


def remove_partial_files(folder: Path) -> list[Path]:
    """Delete what an interrupted save left behind; call it while nothing else writes there."""
    stale = sorted(folder.glob(f"*{PARTIAL_SUFFIX}"))  # of files with a dot in front, of sharded ones without
    for path in stale:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return stale


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written by ``write_atomically`` and read with ``weights_only=True``.

    The newest but one is kept as ``previous.ckpt``, for the day on which the newest turns out to be damaged.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        write_atomically(checkpoint, path, path.with_name(PREVIOUS) if path.name == LAST else None)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        if Path(path).is_dir():
            raise UserError(
                f"ckpt_path = {path}: a folder of parts; only FSDP2 goes on from it, also on one device "
                "(--config overlays/fsdp)."
            )
        return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only=True)
