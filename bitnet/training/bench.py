"""``bitnet bench train``: the time of a training step, of several recipes side by side.

Full steps (forward, backward, clipping, optimizer) on random ids at the shapes of a config. One step of each contestant
after another, so that a slow moment of the machine meets all of them; medians, and the median of the paired ratios to
the first contestant. Also measured: bytes kept for the backward pass, and the part of a step that goes into quantizing.

A contestant is ``float``, ``ternary`` or ``binary``, with ``_int8`` or ``_int16`` behind it for gradients on int8 units
(``bitnet.layers.Arithmetic``), and ``torchao`` or ``onebitllms`` for the low-bit training of these libraries.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bitnet.config import ModelConfig, OptimConfig
from bitnet.errors import UserError
from bitnet.estimate import flops_per_token
from bitnet.layers import Arithmetic, BitLinear, integer_products, low_bit_layers, swap_linears
from bitnet.layers.levels_together import hold_levels, release_levels
from bitnet.layers.normed_rows import fuse_norms
from bitnet.loss import next_token_loss
from bitnet.model import Transformer
from bitnet.progress import TableConsole
from bitnet.recipes import BitNet
from bitnet.training.optim import build_optimizer
from bitnet_kernels.bench import describe_device

KINDS = ("float", "ternary", "binary")
GRADIENTS = {"": "float", "int8": "int8", "int16": "int16"}


@dataclass(kw_only=True)
class Step:
    """Figures of one contestant; times in milliseconds, memory in bytes."""

    name: str
    ms: float
    ratio: float
    tokens_per_s: float
    flops_per_s: float
    kept: int
    """Bytes of the tensors that autograd keeps between forward and backward, parameters aside."""
    peak: int | None
    """Most bytes allocated on the GPU during a step."""
    quantizing: float
    """Share of a step that goes into quantizing weights and activations."""
    loss: float
    """After the last step, on the same random ids for all."""


def _low_bit(name: str, model: Transformer) -> None:
    kind, _, gradient = name.partition("_")
    BitNet(weight="none" if kind == "float" else kind, act_bits="none" if kind == "float" else 8).prepare(model)  # type: ignore[arg-type]
    how: Any = GRADIENTS[gradient]
    forward: Any = "int8" if gradient else "auto"
    for layer in low_bit_layers(model).values():
        layer.arithmetic = Arithmetic(forward=forward, input_gradient=how, weight_gradient=how)
    fuse_norms(model.layers)


def _torchao(model: Transformer) -> None:
    import torchao
    from torchao.prototype.quantized_training import bitnet_training

    torchao.quantize_(model.layers, bitnet_training())


def _onebitllms(model: Transformer) -> None:
    from onebitllms import BitNetLinear

    def replaced(name: str, linear: nn.Linear) -> nn.Module:
        new = BitNetLinear(linear.in_features, linear.out_features, bias=False)
        new.weight = linear.weight
        return new  # type: ignore[no-any-return]

    swap_linears(model, replaced)


PEERS: dict[str, Callable[[Transformer], None]] = {"torchao": _torchao, "onebitllms": _onebitllms}


def check_names(names: list[str]) -> None:
    """Refuse what is no contestant, and a peer that is not installed."""
    from importlib.util import find_spec

    for name in names:
        kind, _, gradient = name.partition("_")
        if name in PEERS:
            if find_spec(name) is None:
                raise UserError(f"--compare {name}: not installed (pip install {name}).")
        elif kind not in KINDS or gradient not in GRADIENTS or (kind == "float" and gradient):
            known = "float, ternary, binary, ternary_int8, ternary_int16, binary_int8, binary_int16"
            raise UserError(f"--compare {name}: must be one of {known}, {', '.join(PEERS)}.")


class Contestant:
    """A model as it is trained under ``name``, and the steps that are taken with it."""

    def __init__(self, name: str, config: ModelConfig, optim: OptimConfig, device: str, compiled: bool) -> None:
        self.name, self.compiled = name, compiled
        torch.manual_seed(0)
        self.model = Transformer(config).to(device)
        if name in PEERS:
            PEERS[name](self.model)
        else:
            _low_bit(name, self.model)
        if compiled:
            for block in self.model.layers:
                block.compile()
        self.optimizer = build_optimizer(self.model, optim)
        self.seconds: list[float] = []
        self.loss = float("nan")
        self.peak: int | None = None

    def forward(self, batch: dict[str, Tensor], bf16: bool) -> Tensor:
        with torch.autocast(batch["inputs"].device.type, torch.bfloat16, enabled=bf16):
            return next_token_loss(self.model, batch)

    def step(self, batch: dict[str, Tensor], bf16: bool) -> Tensor:
        layers = low_bit_layers(self.model).values()
        if batch["inputs"].is_cuda and not self.compiled:  # as while training
            hold_levels(layers)
        loss = self.forward(batch, bf16)
        loss.backward()
        release_levels(layers)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def timed_step(self, batch: dict[str, Tensor], bf16: bool) -> float:
        on_gpu = batch["inputs"].is_cuda
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = self.step(batch, bf16)
        if on_gpu:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        seconds = time.perf_counter() - start
        self.loss = float(loss)
        return seconds

    def kept_bytes(self, batch: dict[str, Tensor], bf16: bool) -> int:
        """Bytes of different storages that autograd keeps, without those of parameters."""
        plain = (Tensor, nn.Parameter)  # a peer's own kinds of tensors have no storage to look at
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters() if type(p.data) in plain}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if type(tensor) not in plain:
                return tensor
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.forward(batch, bf16).backward()
        self.optimizer.zero_grad()
        return sum(kept.values())


@contextmanager
def _watching_quantizers(device: str) -> Iterator[Callable[[], float]]:
    """Seconds spent in ``BitLinear.levels``, ``hold_levels`` and ``activation_rows`` inside the block."""
    spent = 0.0

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            if device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if device != "cpu":
                torch.cuda.synchronize()
            spent += time.perf_counter() - start
            return result

        return call

    with (
        mock.patch.object(BitLinear, "levels", timed(BitLinear.levels)),
        mock.patch("bitnet.layers.bit_linear.activation_rows", timed(integer_products.activation_rows)),
        mock.patch("bitnet.training.bench.hold_levels", timed(hold_levels)),
    ):
        yield lambda: spent


def measure(
    names: list[str],
    config: ModelConfig,
    optim: OptimConfig,
    *,
    rows: int,
    seq_len: int,
    steps: int,
    device: str = "cpu",
    bf16: bool = False,
    compiled: bool = False,
    progress: Callable[..., None] = lambda **_: None,
) -> list[Step]:
    """Steps of all ``names`` in turn; two of each are not counted."""
    contestants = [Contestant(name, config, optim, device, compiled) for name in names]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (rows, seq_len + 1), generator=generator).to(device)
    batch = {"inputs": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    for step in range(steps + 2):
        for contestant in contestants:
            seconds = contestant.timed_step(batch, bf16)
            if step >= 2:
                contestant.seconds.append(seconds)
        progress(completed=step + 1)
    found = []
    for c in contestants:
        with _watching_quantizers(device) as spent:
            whole = c.timed_step(batch, bf16)
            quantizing = spent() / whole
        median = statistics.median(c.seconds)
        ratio = statistics.median(a / b for a, b in zip(c.seconds, contestants[0].seconds, strict=True))
        speed = rows * seq_len / median
        found.append(
            Step(
                name=c.name, ms=1e3 * median, ratio=ratio, tokens_per_s=speed, loss=c.loss, peak=c.peak,
                flops_per_s=speed * flops_per_token(config, seq_len), kept=c.kept_bytes(batch, bf16),
                quantizing=quantizing,
            )
        )  # fmt: skip
    return found


def table_of(found: list[Step], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    first = found[0].name
    for column in ("recipe", "ms per step", f"x {first}", "tokens/s", "GFLOP/s", "kept, MB", "quantizing", "peak, MB"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for s in found:
        peak = "-" if s.peak is None else f"{s.peak / 1e6:,.0f}"
        table.add_row(
            s.name, f"{s.ms:,.1f}", f"{s.ratio:.2f}", f"{s.tokens_per_s:,.0f}", f"{s.flops_per_s / 1e9:,.1f}",
            f"{s.kept / 1e6:,.1f}", f"{s.quantizing:.1%}", peak,
        )  # fmt: skip
    return table


def _draw(runs: dict[str, list[dict[str, Any]]], label: str, file: str, what: str) -> None:
    """Milliseconds of a step, a bar for each recipe, in groups by threads."""
    from matplotlib.figure import Figure

    names = [step["name"] for step in next(iter(runs.values()))]
    figure = Figure(figsize=(1.6 + 1.1 * len(names) * len(runs), 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        places = [group * (len(names) + 1) + i for group in range(len(runs))]
        steps = [found[i] for found in runs.values()]
        bars = axes.bar(places, [step["ms"] for step in steps], label=name, width=0.9)
        axes.bar_label(bars, [f"{step['ratio']:.2f}" for step in steps])
    middles = [group * (len(names) + 1) + (len(names) - 1) / 2 for group in range(len(runs))]
    axes.set_xticks(middles, [f"{count} {what}".replace("1 threads", "1 thread") for count in runs])
    axes.set(ylabel="ms per training step", title=f"{label}: time relative to {names[0]} above each bar")
    axes.legend()
    figure.savefig(file)


def bench_train(
    config: ModelConfig,
    optim: OptimConfig,
    names: list[str],
    *,
    label: str,
    rows: int,
    seq_len: int,
    layers: int | None,
    threads: list[int],
    steps: int,
    device: str,
    bf16: bool,
    compiled: bool,
    json_file: str | None,
    plot: str | None,
) -> None:
    """Measure, print one table for each number of threads, write the figures to ``json_file`` and draw them."""
    from rich.progress import Progress

    check_names(names)
    if seq_len > config.max_seq_len:
        raise UserError(f"--seq_len {seq_len}: the model allows {config.max_seq_len}.")
    config = replace(config, n_layers=layers or config.n_layers)
    console = TableConsole(width=120)
    result: dict[str, Any] = {
        "config": label,
        "model": asdict(config),
        "rows": rows,
        "seq_len": seq_len,
        "steps": steps,
    }
    result |= {"bf16": bf16, "compiled": compiled, "device": describe_device(torch.device(device)), "runs": {}}
    for count in threads:
        torch.set_num_threads(count)
        with Progress(transient=True, console=Console(stderr=True)) as bar:
            found = measure(
                names, config, optim, rows=rows, seq_len=seq_len, steps=steps, device=device, bf16=bf16,
                compiled=compiled, progress=functools.partial(bar.update, bar.add_task("measuring", total=steps + 2)),
            )  # fmt: skip
        where = f"{count} thread{'s' * (count > 1)}" if device == "cpu" else device
        number = "bf16" if bf16 else "float32"
        console.print(
            table_of(found, f"{label}, {config.n_layers} layers, {rows} x {seq_len} tokens, {number}, {where}")
        )
        result["runs"][str(count)] = [asdict(step) for step in found]
    if plot:
        _draw(result["runs"], label, plot, "threads" if device == "cpu" else device)
    if json_file:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
