"""Checkpoints to which every process has written its part: a folder of ``torch.distributed.checkpoint``.

``meta.pt`` holds what an ordinary checkpoint holds beside tensors; ``.metadata`` says where in the ``.distcp`` files
which piece of which tensor lies. That file is a pickle, which can run code when it is read. So it is read here by an
unpickler that knows the few classes it may name, and of the rest only tensors of the model are taken.

Each process leaves the checksums of the files it has written, as ``sha256sum -c`` reads them.
"""

import hashlib
import importlib
import io
import math
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from bitnet.checkpoint_zip import check_checkpoint_file, refuse_unpacking
from bitnet.errors import UserError
from bitnet.tensor_file import check_plain_name

EXTRA = "meta.pt"
INDEX = ".metadata"
SUMS = ".sha256"

_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_NAMES = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch._C", "_get_layout"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of an index, dtypes, and nothing that acts."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _NAMES or (module in _MODULES and isinstance(_attribute(module, name), type))
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            known = True
        if not known or "." in name:
            raise pickle.UnpicklingError(f"the index names {module}.{name}")
        return _attribute(module, name)


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name, None)


def is_sharded(path: Path) -> bool:
    """Whether ``path`` is the folder of such a checkpoint."""
    return (path / INDEX).is_file() and (path / EXTRA).is_file()


def write_checksums(folder: Path, process: int) -> None:
    """Called by every process when all have written to ``folder``: each for its own files, the first for the rest."""
    names = sorted(file.name for file in folder.glob(f"__{process}_*.distcp"))
    names += [EXTRA, INDEX] if process == 0 else []
    with (folder / f"{process}{SUMS}").open("w", encoding="utf-8") as file:
        file.writelines(f"{_sha256(folder / name)}  {name}\n" for name in names)
        file.flush()
        os.fsync(file.fileno())


def damage_of_parts(folder: Path) -> str:
    """What is wrong with the bytes of such a checkpoint, or an empty string. Every file is read once."""
    files = sorted(f for f in folder.iterdir() if f.name in (EXTRA, INDEX) or f.suffix in (".distcp", SUMS))
    for file in files:
        if not file.is_file():  # a pipe would wait, and a device never end
            return f"{file.name} is no file"
    sums: dict[str, str] = {}
    for file in files:
        if file.suffix == SUMS:
            with file.open(encoding="utf-8", errors="replace") as lines:
                listed = lines.read(1 << 16)  # a process has a file or two, whatever a stranger says
            sums |= {name: digest for digest, _, name in (line.partition("  ") for line in listed.splitlines())}
    if not sums:
        return "it has no checksums"
    there = {file.name for file in files if file.suffix != SUMS}
    if odd := sorted((sums.keys() | {EXTRA, INDEX}) ^ there):
        return f"{odd[0]} is missing" if odd[0] not in there else f"the checksum of {odd[0]} is missing"
    wrong = (name for name in sorted(there) if _sha256(folder / name) != sums[name])
    return next((f"the checksum of {name} is wrong" for name in wrong), "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def what_failed(error: Any) -> Exception:
    """The first of the errors that a ``CheckpointException`` of ``torch.distributed.checkpoint`` wraps."""
    wrapped = [failure for failure, _ in error.failures.values()]
    first = next((e for e in wrapped if isinstance(e, UserError)), wrapped[0])
    return first if isinstance(first, Exception) else RuntimeError(str(first))


def read_sharded(folder: Path) -> dict[str, Any]:
    """Plain values and the model's tensors, whole, on the CPU. The optimizer's are left where they are."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    available = sum(file.stat().st_size for file in folder.glob("*.distcp") if file.is_file())

    class Reader(FileSystemReader):
        def _slice_file(self, file: Any, sinfo: Any) -> Any:
            file.seek(sinfo.offset)
            part = io.BytesIO(file.read(sinfo.length))
            refuse_unpacking(part, sinfo.length, folder / sinfo.relative_path)
            return part

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with (folder / INDEX).open("rb") as file:
                index = _IndexUnpickler(file).load()
            if not isinstance(index, Metadata):
                raise pickle.UnpicklingError(f"{INDEX} is no index of a checkpoint")
            for place in (index.storage_data or {}).values():
                check_plain_name(folder / INDEX, place.relative_path)
                if not (folder / place.relative_path).is_file() or getattr(place, "transform_descriptors", None):
                    raise UserError(f"{folder / place.relative_path}: named in {INDEX}, and no plain file.")
            if index.storage_meta is None:
                index.storage_meta = StorageMeta()
            index.storage_meta.load_id = self.load_id
            return index

    check_checkpoint_file(folder / EXTRA)
    content: dict[str, Any] = torch.load(folder / EXTRA, map_location="cpu", weights_only=True)
    reader = Reader(folder)
    entries = {
        name: entry
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
    }
    wanted = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in entries.values())
    if wanted > available:
        raise UserError(f"{folder / INDEX}: names {wanted:,} bytes of tensors; the files beside it hold {available:,}.")
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(state, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # no Exception: nobody above would see it
            raise what_failed(error) from error
    content["state_dict"] = {name.removeprefix("state_dict."): tensor for name, tensor in state.items()}
    return content
