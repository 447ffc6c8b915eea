"""``bitnet bench decode``: tokens per second and peak memory of a whole packed model, one fresh process per setting.

As other engines do, it times a prompt into an empty cache, and tokens one by one behind ``depth`` others.
"""

import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.generation import decoder_of, prefill
from bitnet.inference.files import load_packed, place
from bitnet.inference.header import read_header
from bitnet.inference.packed_linear import HeadDtype, LayerForm, PackedLinear
from bitnet.inference.packed_model import PackedTransformer
from bitnet.inference.packing import packed_skeleton
from bitnet.memory import peak_bytes
from bitnet.model import Transformer, without_memory
from bitnet.progress import TableConsole
from bitnet.quantizers import WEIGHT_QUANTIZERS
from bitnet_kernels.bench import describe_device

REPEATS = 3


def _random_bytes(format: str, generator: torch.Generator) -> Tensor:
    """A MiB of packed weights, uint8: drawing billions would take longer than all that is measured with them."""
    count = 1 << 20
    if format == "binary1":
        return torch.randint(256, (count,), generator=generator, dtype=torch.uint8)
    codes = torch.randint(3, (4, count), generator=generator, dtype=torch.uint8)
    return codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6


def random_packed(config: ModelConfig, weight: str, head: HeadDtype) -> PackedTransformer:
    """A packed model of the shape of ``config`` with random weights, made without ever holding float ones."""
    format = WEIGHT_QUANTIZERS[weight].format
    with without_memory():
        names = [n for n, m in Transformer(config).layers.named_modules() if isinstance(m, torch.nn.Linear)]
    model = packed_skeleton(config, {f"layers.{name}": LayerForm(format) for name in names}, head)
    place(model)
    generator = torch.Generator().manual_seed(0)
    block = _random_bytes(format, generator)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(".packed"):
            for part in tensor.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
        elif name.endswith("inv_scale"):
            tensor.fill_(30.0)
        elif tensor.dtype == torch.int8:
            tensor.random_(-127, 128, generator=generator)
        elif name.endswith("scale"):
            tensor.fill_(1e-3)
        elif tensor.ndim == 2:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
        else:
            tensor.fill_(1.0)
    assert all(isinstance(m, PackedLinear) for n, m in model.named_modules() if n.endswith(("wq", "w2")))
    return model.join_blocks()


def _next_token(logits: Tensor) -> Tensor:
    token = logits.argmax(dim=-1, keepdim=True)
    if token.is_cuda:
        torch.cuda.synchronize()
    return token


def _prefill_speed(model: Transformer, ids: Tensor) -> float:
    """Tokens per second of a prompt into an empty cache."""
    cache = model.new_cache(1, ids.shape[1])
    start = time.perf_counter()
    _next_token(prefill(model, ids, cache))
    return ids.shape[1] / (time.perf_counter() - start)


def _decode_speed(model: Transformer, ids: Tensor, tokens: int) -> float:
    """Tokens per second, one after another behind ``ids``."""
    cache = model.new_cache(1, ids.shape[1] + 1 + tokens)
    decode = decoder_of(model, cache)
    token = _next_token(decode(_next_token(prefill(model, ids, cache))))  # the first step compiles, or captures a graph
    start = time.perf_counter()
    for _ in range(tokens):
        token = _next_token(decode(token))
    return tokens / (time.perf_counter() - start)


def _measure(
    source: str | dict[str, Any],
    weight: str,
    head: HeadDtype,
    threads: int,
    tokens: int,
    prompt: int,
    depth: int,
    device: str,
) -> dict[str, float]:
    """Runs in a process of its own, which imports and loads before anything is timed."""

    def load() -> Transformer:
        return load_packed(source)[0] if isinstance(source, str) else random_packed(ModelConfig(**source), weight, head)

    return serving_speed(load, threads=threads, tokens=tokens, prompt=prompt, depth=depth, device=device)


def serving_speed(
    load: Callable[[], Transformer],
    *,
    threads: int,
    tokens: int,
    prompt: int,
    depth: int = 0,
    device: str = "cpu",
) -> dict[str, float]:
    """Tokens per second of decoding and of a prompt, and memory in MB, of the model that ``load`` gives.

    To be called in a fresh process: memory is that of the whole process.
    """
    idle = peak_bytes() / 2**20
    torch.set_num_threads(threads)
    model = load()
    loaded = peak_bytes() / 2**20
    model = model.to(device)
    ids = torch.randint(
        model.config.vocab_size, (1, max(prompt, depth + 1)), generator=torch.Generator().manual_seed(0)
    ).to(device)

    with torch.inference_mode():
        prefills = [_prefill_speed(model, ids[:, :prompt]) for _ in range(REPEATS + 1)]
        decodes = [_decode_speed(model, ids[:, : depth + 1], tokens) for _ in range(REPEATS + 1)]
    return {
        "decode_tokens_per_s": statistics.median(decodes[-REPEATS:]),
        "prefill_tokens_per_s": statistics.median(prefills[-REPEATS:]),
        "peak_rss_mb": peak_bytes() / 2**20,
        "rss_after_load_mb": loaded,
        "rss_after_import_mb": idle,
    }


def bench_decode(
    model: str,
    shape: tuple[ModelConfig, str] | None = None,
    *,
    threads: list[int] | None = None,
    tokens: int | None = None,
    prompt_tokens: int | None = None,
    depth: int = 0,
    head: HeadDtype = "int8",
    device: str = "cpu",
    json_file: str | None = None,
    plot: str | None = None,
) -> dict[str, Any]:
    """Measure the packed file ``model``, or random weights of ``shape`` (config and kind); print and write files."""
    config, weight = shape or (read_header(model).config, "")
    if shape and weight not in ("ternary", "binary"):
        raise UserError(f"{model}: its weights are of the kind {weight!r}; ternary or binary ones can be packed.")
    source = dataclasses.asdict(config) if shape else model
    context = config.max_seq_len
    tokens = min(128, context - depth - 2) if tokens is None else tokens
    prompt_tokens = min(256, context) if prompt_tokens is None else prompt_tokens
    if tokens < 1 or prompt_tokens < 1 or depth < 0:
        raise UserError(f"--tokens {tokens}, --prompt_tokens {prompt_tokens}, --depth {depth}: too small.")
    if max(prompt_tokens, depth + 2 + tokens) > context:
        raise UserError(
            f"--prompt_tokens {prompt_tokens}, and --depth {depth} with --tokens {tokens}: the context of the model "
            f"holds {context}."
        )
    results: dict[str, dict[str, float]] = {}
    settings = threads or [torch.get_num_threads()]
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("decoding", total=len(settings))
        for n in settings:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                job = pool.submit(_measure, source, weight, head, n, tokens, prompt_tokens, depth, device)
                results[str(n)] = job.result()
            bar.advance(task)
    what = describe_device(torch.device(device))
    table = Table(title=f"{model} on {what.split(',')[0]}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("threads", "decode tok/s", "prefill tok/s", "peak memory MB", "of it model and cache"):
        table.add_column(column, justify="right")
    for setting, r in results.items():
        own = r["peak_rss_mb"] - r["rss_after_import_mb"]
        table.add_row(
            setting, f"{r['decode_tokens_per_s']:,.1f}", f"{r['prefill_tokens_per_s']:,.1f}",
            f"{r['peak_rss_mb']:,.0f}", f"{own:,.0f}",
        )  # fmt: skip
    TableConsole(width=100).print(table)
    content = {
        "model": model, "device": what, "torch": torch.__version__, "tokens": tokens, "prompt_tokens": prompt_tokens,
        "depth": depth,
        "threads": results,
    }  # fmt: skip
    if json_file:
        Path(json_file).write_text(json.dumps(content, indent=1) + "\n")
    if plot:
        _draw(results, f"{Path(model).name}, {what.split(',')[0]}", plot)
    return content


def _draw(results: dict[str, dict[str, float]], title: str, file: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, key, label, colour in zip(
        figure.subplots(1, 2),
        ("decode_tokens_per_s", "prefill_tokens_per_s"),
        ("decode", "prefill"),
        ("C0", "C2"),
        strict=True,
    ):
        bars = axes.bar(list(results), [r[key] for r in results.values()], color=colour, width=0.55)
        axes.bar_label(bars, fmt="{:,.0f}", padding=2)
        axes.set(title=label, xlabel="threads", ylabel="tokens per second")
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
