"""Measure Triton tiles on the device at hand; keep the winners in the user's cache (``bitnet bench kernels --tune``).

Only this changes what ``configurations.choose`` answers, and only for the shapes that were measured. A candidate must
give the exact result of the shipped tile before it is timed.
"""

import functools
import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from bitnet_kernels import configurations
from bitnet_kernels.bench import Call, time_calls
from bitnet_kernels.configurations import SHARED_KB, Shape, Tile, key_of, shared_bytes, table, tuned_file
from bitnet_kernels.formats import FORMATS


def candidates(shape: Shape, planes: int) -> Iterator[Tile]:
    """Tiles worth trying: the shipped one first, then others that fit the architecture."""
    first = table(shape, planes)
    yield first
    tokens = sorted({first.tokens, max(16, first.tokens // 2), min(256, first.tokens * 2)})
    for rows in (32, 64, 128):
        for width in tokens:
            for bytes_ in (64, 128):
                for warps in (4, 8):
                    for stages in (2, 3, 4, 5):
                        for split in (1,) if shape.m > 64 else (1, 2, 4, 8):
                            tile = Tile(rows, width, bytes_, warps, stages, split)
                            fits = shared_bytes(tile, planes, shape.arch) <= SHARED_KB.get(shape.arch, 99) * 1024
                            # More accumulators than this a thread, and they spill.
                            if fits and rows * width <= 64 * 32 * warps and tile != first:
                                yield tile


def sample(shape: Shape, planes: int, budget: int) -> list[Tile]:
    """At most ``budget`` candidates, the same each time: the shipped one and others from all over the list."""
    first, *others = candidates(shape, planes)
    return [first, *random.Random(0).sample(others, min(budget - 1, len(others)))]


def runnable(tiles: list[Tile], call: Callable[[Tile], object], device: torch.device) -> list[Tile]:
    """Those of ``tiles`` whose kernel compiles and runs, by ``call``. The first, the shipped one, must."""

    def works(tile: Tile) -> bool:
        try:
            call(tile)
        except Exception:  # more registers or shared memory than this GPU has: the compiler says so in many ways
            if tile is tiles[0]:
                raise
            return False
        return True

    # A kernel takes a second to compile, most of it outside of Python. A new thread has no CUDA context until it asks.
    begin = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with ThreadPoolExecutor(os.cpu_count(), initializer=begin) as pool:
        return [tile for tile, fits in zip(tiles, pool.map(works, tiles), strict=True) if fits]


def _fastest(shape: Shape, copies: list[Tensor], format: str, k: int, budget: int) -> Tile:
    """The fastest of ``budget`` candidates for one shape; ``copies`` are packed weights that exceed the cache."""
    from bitnet_kernels import triton_matmul

    device, (m, n) = copies[0].device, (shape.m, shape.n)
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
    row_sum = x.sum(-1, dtype=torch.int32)
    ones = torch.ones(m, 1, dtype=torch.float32, device=device)
    scales = ones, ones[0]

    def call(i: int, tile: Tile) -> Tensor:
        w = copies[i % len(copies)]
        return triton_matmul.packed_matmul(
            x, w, format, n, k, *scales, row_sum=row_sum, out_dtype=torch.bfloat16, tile=tile
        )

    tiles = runnable(sample(shape, FORMATS[format].planes, budget), lambda tile: call(0, tile), device)
    expected = call(0, tiles[0])
    right = {str(tile): tile for tile in tiles if torch.equal(call(0, tile), expected)}
    calls: dict[str, Call] = {name: functools.partial(call, tile=tile) for name, tile in right.items()}
    seconds = time_calls(calls, device)
    return right[min(seconds, key=seconds.__getitem__)]


def tune(shapes: list[tuple[int, int]], tokens: list[int], format: str, budget: int = 40) -> dict[str, Tile]:
    """The fastest tile for each shape (N, K) and number of tokens, written to the cache."""
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability()
    found: dict[str, Tile] = {}
    for n, k in shapes:
        levels = torch.tensor(FORMATS[format].levels, dtype=torch.int8, device=device)
        packed = FORMATS[format].pack(levels[torch.randint(len(levels), (n, k), device=device)])
        copies = [packed.clone() for _ in range(max(2, (128 << 20) // packed.numel()))]
        for m in tokens:
            shape = Shape(10 * major + minor, m, n, packed.shape[1])
            found[key_of(shape, FORMATS[format].planes)] = _fastest(shape, copies, format, k, budget)
    _write(found)
    return found


def _write(found: dict[str, Tile]) -> None:
    path = Path(tuned_file())
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({**before, **{key: asdict(tile) for key, tile in found.items()}}, indent=1))
    os.replace(partial, path)
    configurations.forget()
