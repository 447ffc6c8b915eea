"""What the targets share: JSON mutations, and the rule that an input is read or refused with ``UserError``."""

import json
import os
import random
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import torch

with atheris.instrument_imports(include=["bitnet"]):
    from bitnet.errors import UserError
    from bitnet.inference.files import load_packed
    from bitnet.inference.header import NO_DIGEST, seal_of, with_seal
    from bitnet.interchange.gguf_import import read_gguf
    from bitnet.interchange.hf_import import read_hf

__all__ = ["NO_DIGEST", "filled", "fuzz", "json_mutator", "load_packed", "read_gguf", "read_hf", "seal_of", "with_seal"]

ADDRESS_SPACE = 6 << 30
"""Nothing here is larger than a few kilobytes, so that whoever asks for more has believed a header."""
CORPUS = Path(__file__).parent / "corpus"
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
VALUES: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**30, -(2**63)),
    *(0.5, 1e-320, 1e308, float("nan"), float("inf"), True, False, None, "", "x", "\0", "\ud800", "../x", "é" * 300),
    *([], {}, [[]], [0], [-1], [2**62, 2], {"": 0}, ["ternary2", 8], [1] * 100),
]


def mutate_json(value: Any, choose: random.Random) -> Any:
    """The value with one part replaced, removed, doubled or moved."""
    places = []

    def walk(parent: Any) -> None:
        items = parent.items() if isinstance(parent, dict) else enumerate(parent)
        for key, child in list(items):
            places.append((parent, key))
            if isinstance(child, dict | list):
                walk(child)

    if not isinstance(value, dict | list) or not value:
        return choose.choice(VALUES)
    walk(value)
    parent, key = choose.choice(places)
    kind = choose.randrange(6)
    if kind == 0:
        parent.pop(key)
    elif kind == 1:
        other, its_key = choose.choice(places)
        if its_key in other if isinstance(other, dict) else its_key < len(other):
            parent[key] = json.loads(json.dumps(other[its_key]))
    elif kind == 2 and isinstance(parent, dict):
        parent[str(choose.choice([*VALUES, *parent]))] = parent[key]
    elif kind == 3 and isinstance(parent[key], int):
        parent[key] += choose.choice((-1, 1, 8, 64, 2**32))
    else:
        parent[key] = choose.choice(VALUES)
    return value


def json_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    """Parts between NUL bytes are JSON texts; half of the mutations are of JSON, half of bytes."""
    choose = random.Random(seed)
    if choose.random() < 0.7:
        parts = data.split(b"\0")
        at = choose.randrange(len(parts))
        try:
            value = json.loads(parts[at])
            for _ in range(choose.choice((1, 1, 1, 2, 4))):
                value = mutate_json(value, choose)
            parts[at] = json.dumps(value).encode()
            return b"\0".join(parts)[:max_size]
        except (ValueError, RecursionError):
            pass
    return bytes(atheris.Mutate(data, max_size))


def filled(header: bytes) -> bytes:
    """Data for the entries of a safetensors header: ones for floats, zeros for the rest."""
    try:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        size = max(entry["data_offsets"][1] for entry in entries)
        if type(size) is not int or not 0 <= size < 1 << 20:
            return b""
        data = bytearray(size)
        for entry in entries:
            start, end = entry["data_offsets"]
            one = {"F32": b"\0\0\x80\x3f", "F16": b"\0\x3c"}.get(entry["dtype"], b"\0")
            data[start:end] = (one * size)[: end - start]
        return bytes(data[:size])
    except Exception:
        return b""


def fuzz(name: str, read: Callable[[bytes, Path], None], mutator: Callable[..., bytes] | None = None) -> None:
    """Call ``read(input, folder)``; every exception but ``UserError`` is a finding. Options are libFuzzer's."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))

    def one(data: bytes) -> None:
        try:
            read(data, folder)
        except UserError as error:
            if "\n" in str(error):
                raise AssertionError("a refusal of more than one line") from error

    known = [argument for argument in sys.argv if not argument.startswith("-")]
    limits = ["-timeout=60", "-rss_limit_mb=2048", "-max_len=16384"]
    where = known[1:] or [str(CORPUS / name)]
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    if not os.path.isfile(where[0]):
        os.makedirs(where[0], exist_ok=True)
    atheris.Setup([sys.argv[0], *limits, *options, *where], one, **({"custom_mutator": mutator} if mutator else {}))
    atheris.Fuzz()
