"""What is looked at before ``torch.load`` reads a file that may come from a stranger.

torch.save stores every part of its zip as it is. A part that unpacks to more than it takes in the file was not written
by it: 262 KB can claim 256 MB.
"""

import os
import zipfile
from pathlib import Path
from typing import IO

from bitnet.errors import UserError


def refuse_unpacking(file: IO[bytes], size: int, name: object) -> None:
    """Raises ``UserError`` unless ``file``, of ``size`` bytes, is a zip whose parts are stored as they are."""
    try:
        with zipfile.ZipFile(file) as content:
            parts = content.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{name}: not a readable checkpoint ({error}).") from error
    stored = all(part.compress_type == zipfile.ZIP_STORED and part.file_size == part.compress_size for part in parts)
    total = sum(part.file_size for part in parts)
    if not stored or total > size:
        raise UserError(
            f"{name}: not a checkpoint that torch wrote: {size:,} bytes that unpack to {total:,}; "
            "get it again from where it was trained."
        )
    file.seek(0)


def check_checkpoint_file(path: Path) -> None:
    """``refuse_unpacking`` for a file; for a pipe, a device or a folder it is refused without being opened."""
    if not path.is_file():
        raise UserError(f"{path}: not a readable checkpoint (it is no file).")
    try:
        with path.open("rb") as file:
            refuse_unpacking(file, os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
