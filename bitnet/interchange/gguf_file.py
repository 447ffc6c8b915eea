"""The header of a GGUF file, checked before any memory is taken; tensors stay in the file until they are asked for.

Layout: magic, version, counts, then key-value pairs, then name, sizes, type and place of each tensor, then padding up
to the alignment, then the tensors, each padded. The rules are those of llama.cpp's loader. This parser exists because
the gguf package trusts its file; types of tensors and their dequantization are that package's.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import UserError
from bitnet.tensor_file import Malformed

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
STRING, ARRAY, UINT32 = 8, 9, 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type number of a value -> its code in ``struct``."""


def gguf_package() -> ModuleType:
    """The gguf package. Raises ``UserError`` where it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UserError("GGUF files need the package gguf (pip install 'bitnet-lightning[gguf]').") from error
    return gguf


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: ``shape`` is rows first, ``start`` counts from the beginning of the file."""

    type_name: str
    shape: tuple[int, ...]
    start: int
    row_bytes: int
    nbytes: int


class _Cursor:
    """Reads on from a place; no step goes beyond the end."""

    def __init__(self, data: NDArray[np.uint8], at: int) -> None:
        self.data, self.at = data, at

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise Malformed("it ends inside its header")
        self.at += n
        return self.data[self.at - n : self.at].tobytes()

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise Malformed("a text in its header is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise Malformed(f"a key has the unknown type {kind}")
        of, n = self.number("I"), self.number("Q")
        if of == STRING:
            if n > (len(self.data) - self.at) // 8:  # each has at least its length
                raise Malformed("a list in its header does not fit into it")
            return [self.text() for _ in range(n)]
        if of not in SCALARS:
            raise Malformed(f"a list has the type {of}, which lists cannot have")
        dtype = np.dtype(f"<{SCALARS[of]}")
        return np.frombuffer(self.take(n * dtype.itemsize), dtype).tolist()


class GgufFile:
    """Keys and tensors of a file. Raises ``UserError`` for one that is not whole or makes no sense."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            if not path.is_file():
                raise UserError(f"{path}: no such file.")
            size = path.stat().st_size
            self._data = np.memmap(path, mode="r", dtype=np.uint8) if size else np.zeros(0, np.uint8)
            self._read_header()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
        except Malformed as error:
            raise UserError(f"{path}: not a GGUF file that can be read ({error}).") from error

    def _read_header(self) -> None:
        cursor = _Cursor(self._data, 0)
        if cursor.take(4) != MAGIC:
            raise Malformed("it does not begin with GGUF")
        version = cursor.number("I")
        if version not in VERSIONS:
            raise Malformed(f"version {version}; this library reads {' and '.join(map(str, VERSIONS))}")
        n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
        if n_tensors + n_keys > len(self._data):
            raise Malformed("it has fewer bytes than keys and tensors")
        alignment = 32
        for _ in range(n_keys):
            key, kind = cursor.text(), cursor.number("I")
            if key in self.fields:
                raise Malformed(f"the key {key} appears twice")
            self.fields[key] = cursor.value(kind)
            if key == "general.alignment":
                alignment = self.fields[key]
                if kind != UINT32 or alignment < 1 or alignment & (alignment - 1):
                    raise Malformed(f"general.alignment = {alignment}: must be a power of two")
        entries = [self._entry(cursor) for _ in range(n_tensors)]
        data_start, position = -(-cursor.at // alignment) * alignment, 0
        for name, type_number, shape, offset in entries:
            if name in self.tensors:
                raise Malformed(f"the tensor {name} appears twice")
            tensor = _tensor(name, type_number, shape, data_start + offset)
            if offset != position or tensor.start + tensor.nbytes > len(self._data):
                raise Malformed(f"{name} does not lie where it should, or beyond its end")
            self.tensors[name] = tensor
            position += -(-tensor.nbytes // alignment) * alignment

    def _entry(self, cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
        name, dims = cursor.text(), cursor.number("I")
        if not 1 <= dims <= MAX_DIMS:
            raise Malformed(f"{name} has {dims} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dims))
        return name, cursor.number("I"), shape[::-1], cursor.number("Q")

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor, dequantized. Raises ``UserError`` for a type that the gguf package cannot dequantize."""
        gguf = gguf_package()
        tensor = self.tensors[name]
        stored = self._data[tensor.start : tensor.start + tensor.nbytes]
        rows = stored.reshape(*tensor.shape[:-1], tensor.row_bytes)
        try:
            dense = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[tensor.type_name])
        except NotImplementedError as error:
            raise UserError(f"{self.path}: {name} is of type {tensor.type_name}, which cannot be read.") from error
        return np.array(dense, dtype=np.float32)  # a copy: the memory of float32 tensors is the file


def _tensor(name: str, type_number: int, shape: tuple[int, ...], start: int) -> GgufTensor:
    gguf = gguf_package()
    try:
        kind = gguf.GGMLQuantizationType(type_number)
    except ValueError as error:
        raise Malformed(
            f"{name} has a type that the gguf package does not read, such as q2_0 or i2_s; "
            "import the model from its tq2_0 or f16 file, or from where it was exported"
        ) from error
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise Malformed(f"{name} has the shape {shape}, of which {kind.name} cannot be")
    row_bytes = shape[-1] // block * block_bytes
    nbytes = row_bytes
    for n in shape[:-1]:
        nbytes *= n
    return GgufTensor(kind.name, shape, start, row_bytes, nbytes)
