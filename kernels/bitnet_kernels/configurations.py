"""Which tile a Triton product uses, chosen from a table in plain Python: nothing is tuned while a program runs.

A configuration is picked by architecture, number of tokens and size of the matrix. ``tuning.py`` measures alternatives
on a device and writes them to a file in the user's cache; what it found there goes before the table.
"""

import functools
import json
from dataclasses import dataclass, replace

from bitnet_kernels.cpu.build import cache_folder


@dataclass(frozen=True)
class Tile:
    """Rows, tokens and packed bytes of a program; its warps and pipeline stages; parts that share a sum over K."""

    rows: int
    tokens: int
    bytes: int = 64
    warps: int = 4
    stages: int = 3
    split_k: int = 1


@dataclass(frozen=True)
class Shape:
    """A product as far as the choice depends on it: compute capability (90 for 9.0), M, N and bytes of a packed row."""

    arch: int
    m: int
    n: int
    row_bytes: int


PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148}
"""Streaming multiprocessors of the usual card of an architecture: a split is worth it while programs are fewer."""

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, 121: 99}
"""Shared memory that one program may use."""


def token_bucket(m: int) -> int:
    """Products with as many tokens or fewer share a configuration: 1, 16, 32, 64, 128, ..."""
    return 1 if m == 1 else max(16, 1 << (m - 1).bit_length())


def shared_bytes(tile: Tile, planes: int, arch: int) -> int:
    """Shared memory of a tile: buffered activations and packed weights (the matrix unit of 9.0 holds a stage more)."""
    activations, weights = planes * tile.bytes * tile.tokens, tile.rows * tile.bytes
    return activations * (tile.stages if arch >= 90 else tile.stages - 1) + weights * (tile.stages - 1)


def _fitting(tile: Tile, planes: int, arch: int) -> Tile:
    """The tile with fewer stages, then fewer tokens, until its buffers fit the architecture."""
    while shared_bytes(tile, planes, arch) > SHARED_KB.get(arch, 99) * 1024:
        less = replace(tile, stages=tile.stages - 1) if tile.stages > 2 else replace(tile, tokens=tile.tokens // 2)
        tile = less
    return tile


def table(shape: Shape, planes: int) -> Tile:
    """The shipped choice."""
    if shape.m > 64:
        # 128 x 128 keeps the accumulators of eight warps in registers on every architecture (see the compile tests).
        tile = Tile(rows=128, tokens=128, warps=8, stages=4)
        if planes == 4 and -(-shape.n // 128) * -(-shape.m // 128) < PROCESSORS.get(shape.arch, 108):
            tile = Tile(rows=64, tokens=128, warps=4, stages=4)  # ternary: a third faster at 256 tokens on an H200
        return _fitting(tile, planes, shape.arch)
    tokens = 16 if shape.m <= 16 else 32 if shape.m <= 32 else 64
    rows = 64 if shape.m <= 32 else 128
    programs = -(-shape.n // rows)
    blocks = max(1, shape.row_bytes // 64)
    wanted = 2 * PROCESSORS.get(shape.arch, 108)
    split = 1
    while split < 16 and programs * split * 2 <= wanted and blocks // (split * 2) >= 4:
        split *= 2
    tile = Tile(rows=rows, tokens=tokens, warps=4 if rows == 64 else 8, stages=4, split_k=split)
    return _fitting(tile, planes, shape.arch)


def tuned_file() -> str:
    """Where ``tuning.py`` leaves its findings."""
    return str(cache_folder() / "tiles.json")


@functools.cache
def _tuned() -> dict[str, Tile]:
    try:
        with open(tuned_file(), encoding="utf-8") as file:
            return {key: Tile(**value) for key, value in json.load(file).items()}
    except (OSError, ValueError, TypeError):
        return {}


def forget() -> None:
    """Read the file of tuned tiles anew at the next choice."""
    _tuned.cache_clear()
    choose.cache_clear()


def key_of(shape: Shape, planes: int) -> str:
    """The name of a shape in the file of tuned tiles."""
    return f"sm{shape.arch} planes{planes} m{token_bucket(shape.m)} n{shape.n} b{shape.row_bytes}"


@functools.lru_cache(maxsize=4096)
def choose(shape: Shape, planes: int) -> Tile:
    """The tile for a product: a tuned one if there is one for this very shape, else the table's."""
    return _tuned().get(key_of(shape, planes)) or table(shape, planes)


@dataclass(frozen=True)
class Int8Tile:
    """A tile of the int8 product of training: rows, columns, inputs a step; and how many rows of tiles go together."""

    rows: int
    columns: int
    depth: int = 128
    warps: int = 8
    stages: int = 3
    group: int = 8


def int8_shared_bytes(tile: Int8Tile, arch: int) -> int:
    """Shared memory of a tile's buffers (the matrix unit of 9.0 and later holds a stage more)."""
    return (tile.rows + tile.columns) * tile.depth * (tile.stages if arch >= 90 else tile.stages - 1)


def int8_tile(arch: int, m: int) -> Int8Tile:
    """The shipped choice for m rows. On 9.0 and 10.0 a matrix instruction takes up to 256 columns."""
    if m <= 64:
        return Int8Tile(rows=64, columns=128, warps=4, stages=4 if arch >= 90 else 3)
    if 90 <= arch < 120:
        return Int8Tile(rows=128, columns=256, stages=4)
    return Int8Tile(rows=128, columns=128, stages=3)
