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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bitnet import tensor_file
from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.inference.packed_linear import LayerForm
from bitnet.inference.packing import HEAD_DTYPES, LayerForms
from bitnet.tensor_file import Entry, Malformed, parse_json

FORMAT_VERSION = 1
NO_DIGEST = "0" * 64
CHUNK = 1 << 22


def seal_of(header: bytes) -> str:
    """The digest of a header, its length included, whose own ``sha256`` is ``NO_DIGEST``."""
    return hashlib.sha256(len(header).to_bytes(8, "little") + header).hexdigest()


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
    tensors: dict[str, Entry]
    """In the order of the file."""
    data_start: int
    description: dict[str, Any]
    """All that the header says under ``bitnet``, optional entries (see ``bitnet.checkpoint.EXTRAS``) among it."""


def damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: not a whole packed model ({what}); copy or pack it again.")


def _config(path: Path, fields: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise damaged(path, str(error).rstrip(".")) from error


def read_header(path: str | Path) -> PackedFile:
    """Read and check the header of a packed model. Raises ``UserError`` for anything else."""
    path = Path(path)
    try:
        text = tensor_file.read_header(path)
        size = path.stat().st_size
        header = parse_json(text)
        metadata = header.pop("__metadata__", {})
        if "bitnet" not in metadata:
            raise UserError(f"{path}: a safetensors file, but not one that 'bitnet pack' wrote.")
        seal = metadata["sha256"]
        if seal_of(with_seal(text, seal, NO_DIGEST)) != seal:
            raise damaged(path, "the digest of its header is wrong")
        description = parse_json(metadata["bitnet"])
        version = description["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: packed format {version}; this version reads {FORMAT_VERSION}.")
        tensors = tensor_file.entries(header, len(text), size)
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
            forms={name: LayerForm(form[0], form[1], *form[2:]) for name, form in description["layers"].items()},
            digests=description["digests"],
            tokenizer_json=description["tokenizer"],
            tensors=tensors,
            data_start=8 + len(text),
            description=description,
        )
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except Malformed as error:
        raise damaged(path, str(error)) from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__} in its header") from error


def stream(file: BinaryIO, packed: PackedFile, name: str) -> Iterator[bytearray]:
    """The bytes of a tensor in chunks of whole rows, digest checked at the end."""
    shape, nbytes = packed.tensors[name].shape, packed.tensors[name].nbytes
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
