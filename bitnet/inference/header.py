"""The header of a packed model file, and the proof that the file is whole.

Layout (safetensors): 8 bytes with the length of the header, a JSON header, the tensors one after another. Under
``__metadata__`` the header has two strings:

* ``bitnet``: JSON with the format version, model config, recipe, tokenizer, the form of each packed linear, how
  embedding and head are stored, and the sha256 of each tensor's bytes;
* ``sha256``: of the header itself, its length included, with this value replaced by 64 zeros.

So every byte of the file is covered. Nothing in it is executed, and no memory is taken before all sizes are checked.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.inference.packing import HEAD_DTYPES, LayerForms

FORMAT_VERSION = 1
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
MAX_HEADER = 100_000_000
"""The limit of the safetensors library."""
NO_DIGEST = "0" * 64
CHUNK = 1 << 22


def seal_of(length: bytes, header: bytes) -> str:
    """The digest of a header whose own ``sha256`` is ``NO_DIGEST``."""
    return hashlib.sha256(length + header).hexdigest()


def with_seal(header: bytes, old: str, new: str) -> bytes:
    """``header`` with another value of ``sha256``."""
    return header.replace(f'"sha256":"{old}"'.encode(), f'"sha256":"{new}"'.encode(), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedFile:
    """What the header of a packed model says, checked as far as it can be without reading the tensors."""

    path: Path
    size: int
    config: ModelConfig
    recipe: dict[str, Any]
    head: str
    forms: LayerForms
    digests: dict[str, str]
    tokenizer_json: str
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int]]
    """Dtype, shape and bytes of each tensor, in the order of the file."""
    data_start: int


def damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: not a whole packed model ({what}); copy or pack it again.")


def _config(path: Path, fields: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise damaged(path, str(error).rstrip(".")) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def read_header(path: str | Path) -> PackedFile:
    """Read and check the header of a packed model. Raises ``UserError`` for anything else."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = file.read(8)
            n = int.from_bytes(length, "little")
            if len(length) < 8 or n > min(MAX_HEADER, size - 8):
                raise damaged(path, "its header does not fit into it")
            text = file.read(n)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        if "bitnet" not in metadata:
            raise UserError(f"{path}: a safetensors file, but not one that 'bitnet pack' wrote.")
        seal = metadata["sha256"]
        blank = with_seal(text, seal, NO_DIGEST)
        if seal_of(length, blank) != seal:
            raise damaged(path, "the digest of its header is wrong")
        description = json.loads(metadata["bitnet"], object_pairs_hook=_unique)
        version = description["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: packed format {version}; this version reads {FORMAT_VERSION}.")
        tensors, position = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            start, end = entry["data_offsets"]
            nbytes = dtype.itemsize
            for n in shape:
                nbytes *= n
            if min(shape, default=0) < 0 or start != position or end - start != nbytes:
                raise damaged(path, f"{name} does not lie where it should")
            tensors[name], position = (dtype, shape, nbytes), end
        if 8 + len(text) + position != size:
            raise damaged(path, f"{8 + len(text) + position:,} bytes expected, {size:,} found")
        if description["head"] not in HEAD_DTYPES or set(description["digests"]) != set(tensors):
            raise damaged(path, "its description does not fit its tensors")
        if description["config"]["n_layers"] > len(tensors):
            raise damaged(path, "it has fewer tensors than blocks")
        return PackedFile(
            path=path,
            size=size,
            config=_config(path, description["config"]),
            recipe=dict(description["recipe"]),
            head=description["head"],
            forms={name: (form[0], form[1]) for name, form in description["layers"].items()},
            digests=description["digests"],
            tokenizer_json=description["tokenizer"],
            tensors=tensors,
            data_start=8 + len(text),
        )
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__} in its header") from error


def stream(file: BinaryIO, packed: PackedFile, name: str) -> Iterator[bytearray]:
    """The bytes of a tensor in chunks of whole rows, digest checked at the end."""
    _, shape, nbytes = packed.tensors[name]
    row = max(1, nbytes // max(1, shape[0])) if shape else nbytes
    step = max(row, CHUNK // row * row)
    digest = hashlib.sha256()
    for start in range(0, nbytes, step):
        chunk = bytearray(min(step, nbytes - start))
        if file.readinto(chunk) != len(chunk):  # type: ignore[attr-defined]
            raise damaged(packed.path, f"{name} ends early")
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != packed.digests[name]:
        raise damaged(packed.path, f"the digest of {name} is wrong")


def verify(packed: PackedFile) -> None:
    """Read every tensor and check its digest. Raises ``UserError`` at the first that is wrong."""
    with packed.path.open("rb") as file:
        file.seek(packed.data_start)
        for name in packed.tensors:
            for _ in stream(file, packed, name):
                pass
