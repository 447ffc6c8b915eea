"""``bitnet bench kernels``: packed products timed against torch's and against the limits of the machine, measured here.

Every shape is checked for exact equality before it is timed. All methods of a shape take turns within each round, on
weights that rotate through more memory than the caches hold; the figure is the median over the rounds. On a GPU a CUDA
graph of many calls is replayed, so that launches do not count. The ceilings are those of this run: the best
bandwidth and the best int8 rate that it saw.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bitnet_kernels.cpu.memory import empty_in_huge_pages
from bitnet_kernels.formats import FORMATS
from bitnet_kernels.ops import packed_matmul, rms_norm_quantize

SHAPES = {
    "bitnet-2b": "3840x2560,2560x2560,13824x2560,2560x6912",
    "llama-8b": "6144x4096,4096x4096,28672x4096,4096x14336",
    "small": "2560x2560,2560x6912,4096x14336",
}
ROTATED_BYTES = 128 << 20
"""Weights of one method that are gone through before the first comes again."""
ROUNDS = {"cpu": 15, "cuda": 20}
TURN_S = 5e-3
"""How long a method runs before the next has its turn (on a CPU; at least one call)."""

Call = Callable[[int], Tensor]
"""Run a method on its i-th copy of the weights."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One method on one shape. Bytes are those of weights, activations and result; operations are 2 M N K."""

    method: str
    m: int
    n: int
    k: int
    microseconds: float
    gigabytes_per_s: float
    tera_operations_per_s: float
    percent_of_ceiling: float
    bytes: int


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """``bitnet-2b`` or ``2560x2560,4096x14336`` -> [(N, K), ...]. Raises ``ValueError``."""
    shapes = []
    for part in SHAPES.get(text, text).split(","):
        n, _, k = part.partition("x")
        if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
            raise ValueError(f"--shapes {text}: must be one of {', '.join(SHAPES)}, or NxK,NxK,... such as 2560x2560")
        shapes.append((int(n), int(k)))
    return shapes


def _copies(w: Tensor) -> list[Tensor]:
    """Enough copies of ``w`` to go through ``ROTATED_BYTES``; on a CPU in huge pages, whoever multiplies them."""
    nbytes = w.numel() * w.element_size()
    count = max(2, min(256, -(-ROTATED_BYTES // nbytes)))
    if w.is_cuda:
        return [w.clone() for _ in range(count)]
    arena = empty_in_huge_pages(count * nbytes).view(w.dtype).view(count, *w.shape)
    return list(arena.copy_(w).unbind())


def _methods(
    m: int, n: int, k: int, formats: list[str], device: torch.device
) -> tuple[dict[str, Call], dict[str, int]]:
    """Calls by name, and the bytes that each has to move."""
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
    x_inv, w_inv = torch.rand(m, 1, device=device) + 0.5, torch.rand(1, device=device) + 0.5
    row_sum = x.sum(dim=-1, dtype=torch.int32)
    small = torch.bfloat16 if device.type == "cuda" else torch.float32
    out_bytes = m * n * small.itemsize
    calls: dict[str, Call] = {}
    nbytes: dict[str, int] = {}

    def add(name: str, weights: list[Tensor], call: Callable[[Tensor], Tensor], x_bytes: int) -> None:
        calls[name] = lambda i: call(weights[i % len(weights)])
        nbytes[name] = weights[0].numel() * weights[0].element_size() + x_bytes + out_bytes

    for name in formats:
        levels = torch.tensor(FORMATS[name].levels, dtype=torch.int8, device=device)
        w = levels[torch.randint(len(levels), (n, k), device=device)]
        packed = FORMATS[name].pack(w)
        exact = packed_matmul(x, packed, name, n=n, k=k)
        if not torch.equal(exact.double(), x.double() @ w.double().t()):
            raise AssertionError(f"{name} is wrong at {m} x {n} x {k}: nothing is timed")
        del w

        def ours(p: Tensor, name: str = name) -> Tensor:
            scales = {"x_inv_scale": x_inv, "w_inv_scale": w_inv, "row_sum": row_sum, "out_dtype": small}
            return packed_matmul(x, p, name, n=n, k=k, **scales)  # type: ignore[arg-type]

        add(name, _copies(packed), ours, m * k)
    int8 = torch.randint(-1, 2, (n, k), dtype=torch.int8, device=device)
    if device.type == "cpu" or (m > 16 and n % 8 == 0 and k % 8 == 0):
        copies = [w.t() for w in _copies(int8)]
        add("int8 (_int_mm)", copies, lambda w: torch._int_mm(x, w), m * k)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        if dtype == torch.float32 and device.type == "cuda":
            continue
        floats = x.to(dtype)
        copies = [w.t() for w in _copies(int8.to(dtype))]
        add(name, copies, lambda w, a=floats: a @ w, m * k * dtype.itemsize)  # type: ignore[misc]
    return calls, nbytes


def _time_cpu(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of a call, the methods taking turns of some milliseconds."""
    repeats = {}
    for name, call in calls.items():
        call(0)
        start = time.perf_counter()
        call(1)
        repeats[name] = max(1, min(100, round(TURN_S / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for j in range(repeats[name]):
                call(i * repeats[name] + j)
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def _time_cuda(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    graphs, repeat = {}, 20
    for name, call in calls.items():
        call(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(repeat):
                call(i)
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3 / repeat)
    return {name: statistics.median(values) for name, values in times.items()}


def time_calls(calls: dict[str, Call], device: torch.device) -> dict[str, float]:
    """Median seconds of each call, measured in turns."""
    return (_time_cuda if device.type == "cuda" else _time_cpu)(calls, ROUNDS[device.type])


def ceilings(device: torch.device) -> tuple[float, float]:
    """``(bytes per second, operations per second)`` of this device: a large copy or read, a large int8 product."""
    if device.type == "cuda":
        size = 1 << 30
        source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
        move, moved = (lambda i: target.copy_(source)), 2 * size
    else:
        size = ROTATED_BYTES
        words = empty_in_huge_pages(size).fill_(1).view(torch.float32).view(16, -1)
        move, moved = (lambda i: words.amax(dim=1)), size  # what a product does with its weights: read them once
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device)
    packed = FORMATS["ternary2"].pack(a.clamp(-1, 1))
    calls: dict[str, Call] = {
        "move": move,
        "int8": lambda i: torch._int_mm(a, a.t()),
        "packed": lambda i: packed_matmul(a, packed, n=side, k=side),
    }
    seconds = time_calls(calls, device)
    return moved / seconds["move"], 2 * side**3 / min(seconds["int8"], seconds["packed"])


def _quantizer(m: int, k: int, device: torch.device) -> dict[str, Call]:
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    weight = torch.ones(k, device=device, dtype=x.dtype)
    return {"rms_norm_quantize": lambda i: rms_norm_quantize(x, weight, 1e-5)[0]}


def measure(
    shapes: list[tuple[int, int]], tokens: list[int], formats: list[str], device: torch.device
) -> tuple[list[Result], dict[str, float]]:
    """All methods on all shapes; with the ceilings of the device."""
    bandwidth, rate = ceilings(device)
    timed: list[tuple[str, int, int, int, int, float]] = []
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("timing", total=len(shapes) * len(tokens))
        for n, k in shapes:
            for m in tokens:
                bar.update(task, description=f"M {m}, {n} x {k}")
                calls, nbytes = _methods(m, n, k, formats, device)
                calls |= _quantizer(m, k, device)
                nbytes["rms_norm_quantize"] = 5 * m * k
                seconds = time_calls(calls, device)
                timed += [(name, m, n, k, nbytes[name], t) for name, t in seconds.items()]
                bar.advance(task)

    def operations(name: str, m: int, n: int, k: int) -> int:
        return 0 if name == "rms_norm_quantize" else 2 * m * n * k

    # A ceiling is the best that was seen: where a product beats the calibration, it is the better calibration.
    bandwidth = max([bandwidth, *(moved / t for _, _, _, _, moved, t in timed)])
    rate = max([rate, *(operations(name, m, n, k) / t for name, m, n, k, _, t in timed)])
    results = [
        Result(
            method=name,
            m=m,
            n=n,
            k=k,
            microseconds=t * 1e6,
            gigabytes_per_s=moved / t / 1e9,
            tera_operations_per_s=operations(name, m, n, k) / t / 1e12,
            percent_of_ceiling=100 * max(moved / bandwidth, operations(name, m, n, k) / rate) / t,
            bytes=moved,
        )
        for name, m, n, k, moved, t in timed
    ]
    return results, {"gigabytes_per_s": bandwidth / 1e9, "tera_operations_per_s": rate / 1e12}


def _print(results: list[Result], limits: dict[str, float], title: str) -> None:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("N x K", "M", "method", "µs", "GB/s", "TOPS", "% of ceiling", "x bf16", "x int8"):
        table.add_column(column, justify="left" if column in ("N x K", "method") else "right")
    by_shape: dict[tuple[int, int, int], dict[str, Result]] = {}
    for r in results:
        by_shape.setdefault((r.n, r.k, r.m), {})[r.method] = r
    for (n, k, m), methods in by_shape.items():
        for name, r in methods.items():
            ratios = []
            for other in ("bf16", "int8 (_int_mm)"):
                compared = other in methods and name in FORMATS
                ratios.append(f"{methods[other].microseconds / r.microseconds:.2f}" if compared else "")
            shape = f"{n} x {k}" if name == next(iter(methods)) else ""
            operations = f"{r.tera_operations_per_s:.3f}" if r.tera_operations_per_s else ""
            table.add_row(
                shape, str(m) if shape else "", name, f"{r.microseconds:,.1f}", f"{r.gigabytes_per_s:,.1f}",
                operations, f"{r.percent_of_ceiling:.0f}", *ratios,
            )  # fmt: skip
    console = Console(highlight=False, width=110)
    console.print(table)
    console.print(
        f"ceilings measured in this run: {limits['gigabytes_per_s']:,.1f} GB/s of memory, "
        f"{limits['tera_operations_per_s']:,.3f} TOPS of int8 products"
    )


COLOURS = {"ternary2": "C0", "binary1": "C2", "int8 (_int_mm)": "C1", "bf16": "C3", "fp32": "0.5"}


def draw(results: list[Result], limits: dict[str, float], title: str, file: str) -> None:
    """Operations per second against operations per byte moved, under the two ceilings of the machine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.subplots()
    points = [r for r in results if r.tera_operations_per_s]
    intensity = {id(r): 2 * r.m * r.n * r.k / r.bytes for r in points}
    low, high = min(intensity.values()) / 2, max(intensity.values()) * 2
    bandwidth, rate = limits["gigabytes_per_s"], limits["tera_operations_per_s"]
    ridge = rate * 1e3 / bandwidth
    axes.plot([low, ridge, max(high, ridge * 2)], [low * bandwidth / 1e3, rate, rate], color="0.2", lw=1.5)
    axes.text(low * 1.05, low * bandwidth / 1e3 * 2, f"{bandwidth:,.0f} GB/s", fontsize=8)
    axes.text(max(high, ridge * 2), rate * 1.15, f"{rate:,.2f} TOPS", ha="right", fontsize=8)
    for method, colour in COLOURS.items():
        mine = [r for r in points if r.method == method]
        if not mine:
            continue  # a GPU has no float32 to compare with
        axes.scatter(
            [intensity[id(r)] for r in mine],
            [r.tera_operations_per_s for r in mine],
            s=[14 + 10 * r.m.bit_length() for r in mine],
            color=colour, alpha=0.75, edgecolor="white", linewidth=0.5, label=method,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="TOPS", title=title)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(title="larger dot: more tokens", fontsize=8, title_fontsize=8, loc="lower right")
    figure.savefig(file, dpi=130)


def describe_device(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    from bitnet_kernels.cpu import native

    isa = "torch" if native.library() is None else native.best_isa().name
    return f"{name}, {torch.get_num_threads()} thread{'s'[: torch.get_num_threads() > 1]}, {isa}"


def bench_kernels(
    shapes: str,
    tokens: list[int],
    *,
    device: str | None = None,
    formats: str = "ternary2,binary1",
    tune: bool = False,
    json_file: str | None = None,
    plot: str | None = None,
) -> list[Result]:
    """Measure, print, and write what was asked for. Raises ``ValueError`` for names that are not known."""
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = formats.split(",")
    unknown = [name for name in names if name not in FORMATS or not FORMATS[name].planes]
    if unknown:
        raise ValueError(f"--formats {formats}: must be among {', '.join(n for n, f in FORMATS.items() if f.planes)}")
    parsed = parse_shapes(shapes)
    where = torch.device(wanted)
    if tune and wanted != "cuda":
        raise ValueError("--tune measures Triton tiles and needs --device cuda; a CPU has nothing to tune")
    with torch.inference_mode():
        if tune:
            from bitnet_kernels.tuning import tune as tune_tiles

            for name in names:
                tune_tiles(parsed, tokens, name)
        results, limits = measure(parsed, tokens, names, where)
    title = f"packed products on {describe_device(where)}"
    _print(results, limits, title)
    if json_file:
        content: dict[str, Any] = {
            "device": describe_device(where),
            "torch": torch.__version__,
            "ceilings": limits,
            "results": [asdict(r) for r in results],
        }
        Path(json_file).write_text(json.dumps(content, indent=1) + "\n")
    if plot:
        draw(results, limits, title, plot)
    return results
