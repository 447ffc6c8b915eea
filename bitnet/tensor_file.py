"""safetensors files: headers checked before any memory is taken, tensors read one at a time, files written whole or not
at all.

Layout: 8 bytes with the length of the header, a JSON header with dtype, shape and place of each tensor, and the tensors
one after another. Nothing in such a file is executed.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.errors import UserError
from bitnet.replacing import replacing

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
"""The limit of the safetensors library."""


class Malformed(ValueError):
    """What is wrong with a file, in words that follow its name."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``start`` counts from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("a key appears twice")
    return found


def parse_json(text: str | bytes) -> Any:
    """JSON in which no key appears twice. Raises ``ValueError``."""
    return json.loads(text, object_pairs_hook=_unique)


def read_header(path: Path) -> bytes:
    """The JSON text of the header. Raises ``OSError`` and ``Malformed``."""
    if path.exists() and not path.is_file():
        raise Malformed("it is no file")  # opening a pipe would wait, and a device has no end
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = file.read(8)
        n = int.from_bytes(length, "little")
        if len(length) < 8 or n > min(MAX_HEADER, size - 8):
            raise Malformed("its header does not fit into it")
        return file.read(n)


def entries(header: dict[str, Any], header_bytes: int, size: int) -> dict[str, Entry]:
    """The tensors that ``header`` (without ``__metadata__``) names, in the order of the file of ``size`` bytes.

    Raises ``Malformed`` unless they fill it without gaps, and ``KeyError``, ``TypeError`` or ``ValueError`` for
    senseless entries.
    """
    found, position = {}, 0
    data = 8 + header_bytes
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if any(type(n) is not int for n in (*shape, start, end)):
            raise Malformed(f"{name} has a size that is no whole number")
        nbytes = dtype.itemsize
        for n in shape:
            nbytes *= n
        if min(shape, default=0) < 0 or start != position or end - start != nbytes:
            raise Malformed(f"{name} does not lie where it should")
        found[name], position = Entry(dtype, shape, data + start, nbytes), end
    if data + position != size:
        raise Malformed(f"{data + position:,} bytes expected, {size:,} found")
    return found


def check_plain_name(where: object, name: object) -> None:
    """A name in an index means a file beside it. Raises ``UserError`` for a path to elsewhere, or for no name."""
    plain = isinstance(name, str) and name == Path(name).name and name.isprintable() and "\\" not in name
    if not plain or name in ("", ".", "..") or len(str(name)) > 255:
        raise UserError(f"{where}: names the file {str(name)[:80]!r}; must be the plain name of one beside it.")


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in order; not copied if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def layout(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, list[str]]:
    """``(header, order)`` of a file of these tensors, wide dtypes first, so that each is aligned to its width."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), order


def write(path: Path, header: bytes, tensors: Iterator[Tensor]) -> None:
    """Write a file under its name, or leave nothing there. Raises ``UserError`` when it cannot be written."""
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for tensor in tensors:
                file.write(bytes_of(tensor))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from error


class TensorFile:
    """Reads the tensors of one file, each when it is asked for. Raises ``UserError`` for a file that is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = read_header(path)
            header = parse_json(text)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.entries = entries(header, len(text), path.stat().st_size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
        except Malformed as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}).") from error
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise UserError(f"{path}: not a safetensors file ({type(error).__name__} in its header).") from error

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        entry = self.entries[name]
        flat = torch.empty(entry.nbytes, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(memoryview(flat.numpy())) != entry.nbytes:  # type: ignore[arg-type]
                raise UserError(f"{self.path}: {name} ends early.")
        return flat.view(entry.dtype).view(entry.shape)
