"""F2: GGUF headers built by hand, one fault each; the kinds are those of llama.cpp's own tests and advisories."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitnet.interchange.gguf_file import GgufFile
from bitnet.interchange.gguf_import import read_gguf
from tests.scorecard.trials import costs, refusal

U32, STRING, ARRAY, F32 = 4, 8, 9, 0
KEYS: dict[str, Any] = {"general.architecture": (STRING, b"llama"), "n": (U32, struct.pack("<I", 1))}
TENSORS: dict[str, Any] = {"a": ([4, 2], F32, 0), "b": ([4], F32, 32)}


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def build(
    keys: Any = None,
    tensors: Any = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    data: int = 64,
) -> bytes:
    """A file; ``keys`` are (name, (type, value)), ``tensors`` (name, (sizes, type, offset))."""
    keys = list((KEYS if keys is None else keys).items()) if not isinstance(keys, list) else keys
    tensors = list((TENSORS if tensors is None else tensors).items()) if not isinstance(tensors, list) else tensors
    out = magic + struct.pack("<I", version)
    out += struct.pack("<QQ", len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    for name, (kind, value) in keys:
        name = name if isinstance(name, bytes) else name.encode()
        out += text(name) + struct.pack("<I", kind) + (text(value) if kind == STRING else value)
    for name, (sizes, kind, offset) in tensors:
        name = name if isinstance(name, bytes) else name.encode()
        out += text(name) + struct.pack("<I", len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
        out += struct.pack("<IQ", kind, offset)
    return out + bytes(-len(out) % 32) + bytes(data)


def key(kind: int, value: bytes, name: str = "k") -> bytes:
    return build({**KEYS, name: (kind, value)})


def tensor(*sizes: int, kind: int = F32, offset: int = 0, name: Any = "c") -> bytes:
    return build(tensors=[*TENSORS.items(), (name, (list(sizes), kind, 64 + offset))], data=128)


def array(of: int, n: int, content: bytes = b"") -> bytes:
    return key(ARRAY, struct.pack("<IQ", of, n) + content)


def alignment(value: int, kind: int = U32) -> bytes:
    return key(kind, struct.pack("<I", value), "general.alignment")


BAD: dict[str, Callable[[], bytes]] = {
    "no magic": lambda: build(magic=b"GGML"),
    "nothing": lambda: b"",
    "magic alone": lambda: b"GGUF",
    "version 0": lambda: build(version=0),
    "version 1": lambda: build(version=1),
    "a future version": lambda: build(version=4),
    "the other byte order": lambda: build(version=3 << 24),
    "2^63 keys": lambda: build(n_keys=2**63),
    "2^40 keys": lambda: build(n_keys=2**40),
    "2^63 tensors": lambda: build(n_tensors=2**63),
    "2^40 tensors": lambda: build(n_tensors=2**40),
    "keys that add up to 2^64": lambda: build(n_keys=2**64 - 1, n_tensors=1),
    "a name of 2^63 bytes": lambda: build()[:24] + struct.pack("<Q", 2**63),
    "a name of 2^64 - 1 bytes": lambda: build()[:24] + struct.pack("<Q", 2**64 - 1) + bytes(64),
    "a name that is not UTF-8": lambda: build([(b"\xff\xfe", KEYS["n"])]),
    "a key twice": lambda: build([*KEYS.items(), *KEYS.items()]),
    "an unknown type of key": lambda: key(13, b""),
    "a text of 2^62 bytes": lambda: key(U32, b"")[:-4] + struct.pack("<IQ", STRING, 2**62),
    "an array of 2^62 numbers": lambda: array(U32, 2**62),
    "an array of 2^40 texts": lambda: array(STRING, 2**40),
    "an array of an unknown type": lambda: array(99, 1, b"1234"),
    "an array of arrays": lambda: array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 8),
    "an array of texts, one beyond the end": lambda: array(STRING, 2, text(b"a") + struct.pack("<Q", 2**32)),
    "alignment 0": lambda: alignment(0),
    "alignment 33": lambda: alignment(33),
    "alignment as float": lambda: alignment(32, kind=6),
    "alignment 2^31": lambda: alignment(2**31),
    "a tensor twice": lambda: tensor(4, name="a"),
    "no dimensions": lambda: tensor(),
    "five dimensions": lambda: tensor(1, 1, 1, 1, 1),
    "2^31 dimensions": lambda: tensor(4).replace(text(b"c") + b"\1", text(b"c") + b"\0\0\0\x80", 1),
    "a dimension 0": lambda: tensor(0, 4),
    "2^62 elements": lambda: tensor(2**31, 2**31),
    "2^64 elements, which is 0": lambda: tensor(2**32, 2**32),
    "2^64 + 4 bytes": lambda: tensor(2**62 + 1),
    "a type that nobody knows": lambda: tensor(4, kind=2**31),
    "a type that has gone": lambda: tensor(32, kind=4),
    "a row of half a block": lambda: tensor(16, kind=8),
    "an offset in another tensor": lambda: tensor(4, offset=-32),
    "an offset with a gap": lambda: tensor(4, offset=32),
    "an offset that is not aligned": lambda: tensor(4, offset=1),
    "an offset beyond the end": lambda: build(tensors={"a": ([4], F32, 2**63)}),
    "less data than tensors": lambda: build(data=0),
    "a name of a tensor that is not UTF-8": lambda: tensor(4, name=b"\xff"),
}


@pytest.mark.check("F2", "GGUF headers with one fault each are refused, and take no memory", 40)
def test_headers(tmp_path: Path, tally) -> None:
    file = tmp_path / "m.gguf"
    for sound in (build(), tensor(4), key(ARRAY, struct.pack("<IQ", STRING, 1) + text(b"x")), alignment(32)):
        file.write_bytes(sound)
        assert set(GgufFile(file).tensors) >= {"a", "b"}  # what the faults are put into is sound
    for name, content in BAD.items():
        file.write_bytes(content())
        said: list[str] = []
        _, memory = costs(lambda said=said: said.append(refusal(lambda: read_gguf(file), file, "that can be read")))
        tally(bool(said[0]) and memory < 16e6, f"{name}: {said[0]!r}, {memory / 1e6:.0f} MB")
