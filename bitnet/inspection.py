"""What ``bitnet inspect`` prints: the cost of a config before training, the weights of a run after it."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bitnet.checkpoint import find_checkpoint, model_of, read_checkpoint
from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.estimate import (
    BITS,
    TrainingMemory,
    bits_per_parameter,
    count_parameters,
    flops_per_token,
    packed_bytes,
    training_memory,
)
from bitnet.inference.header import FORMAT_VERSION, read_header
from bitnet.inference.packing import pack
from bitnet.layers import FakeQuantizedLinear, level_shares, low_bit_layers, quantized_layers
from bitnet.progress import TableConsole
from bitnet.scaling import GPUS, Estimate, StrategyName, estimate

if TYPE_CHECKING:
    from bitnet.training.cli import ParsedConfig

SHOWN_FIELDS = (
    "vocab_size",
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "ffn_dim",
    "max_seq_len",
    "activation",
    "sub_norm",
)


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.2f} {unit}"
        n /= 1000
    raise AssertionError


def _print_facts(title: str, facts: dict[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(name, value)
    TableConsole(width=110).print(table)


def _export_facts(config: ModelConfig) -> dict[str, str]:
    return {f"export {name}": "yes" if why is None else f"no: {why}" for name, why in config.export_obstacles().items()}


def _training_memory(parsed: "ParsedConfig", bf16: bool) -> TrainingMemory:
    return training_memory(
        parsed.model,
        weight=getattr(parsed.recipe, "weight", "none"),
        act_bits=getattr(parsed.recipe, "act_bits", "none"),
        rows=parsed.data["batch_size"],
        seq_len=parsed.data["seq_len"],
        bf16=bf16,
        optimizer=parsed.optim.kind,
        loss_chunk=parsed.loss_chunk,
        activation_checkpointing=parsed.activation_checkpointing,
        begins_in_float=parsed.recipe.begins_in_float,
    )


def _parsed(name: str, overrides: list[str]) -> "ParsedConfig":
    """The config. Raises ``UserError`` for one whose sizes, or bits of a weight, only another model tells."""
    from bitnet.recipes import PostTraining
    from bitnet.training.cli import parse_config  # Lightning takes seconds to import

    parsed = parse_config(["--config", name, *overrides])
    unsaid = all(getattr(parsed.model, size) == getattr(ModelConfig, size) for size in ("dim", "n_layers", "ffn_dim"))
    if isinstance(parsed.recipe, PostTraining) or (parsed.recipe.needs_parent and unsaid):
        kind = type(parsed.recipe).__name__
        raise UserError(
            f"{name}: {kind} takes its sizes from model.init_from; inspect that, or the run that comes of it."
        )
    return parsed


def inspect_config(name: str, overrides: list[str]) -> None:
    """Print what training and serving this config takes; nothing is trained and no text is read."""
    parsed = _parsed(name, overrides)
    config, recipe, data = parsed.model, parsed.recipe, parsed.data
    weight: str = getattr(recipe, "weight", "none")
    act_bits: Any = getattr(recipe, "act_bits", "none")
    counts = count_parameters(config)
    rows, seq_len = data["batch_size"], data["seq_len"]
    memory = _training_memory(parsed, bf16=str(parsed.trainer.get("precision") or "").startswith("bf16"))
    tokens_per_step = rows * seq_len * (parsed.trainer.get("accumulate_grad_batches") or 1)
    steps = parsed.trainer.get("max_steps") or -1
    facts = {
        "parameters": f"{counts.total:,}",
        "  linears of the blocks": f"{counts.linear:,} ({weight} weights, {act_bits} activation bits)",
        "  embeddings and head": f"{counts.embeddings:,} ({'tied' if config.tie_embeddings else 'untied'})",
        "  norms": f"{counts.norms:,}",
        "bits per parameter": f"{bits_per_parameter(config, weight):.2f} packed "
        f"({BITS[weight]:g} per weight of a linear, 16 for the rest)",
        "file, packed": _size(packed_bytes(config, weight)),
        "file, float32 latent": _size(4 * counts.total),
        "file, bf16 twin": _size(2 * counts.total),
        "checkpoint": f"{_size(memory.weights + memory.optimizer)} (weights and the state of {parsed.optim.kind})",
        "training memory": f"{_size(memory.total)} for {rows} x {seq_len} tokens",
        f"  weights, gradients, {parsed.optim.kind}": _size(memory.weights + memory.gradients + memory.optimizer),
        "  activations": _size(memory.activations),
        "FLOPs per token": f"{flops_per_token(config, seq_len) / 1e6:,.1f} M in training, "
        f"{flops_per_token(config, seq_len, training=False) / 1e6:,.1f} M forward",
        "tokens per step": f"{tokens_per_step:,} per device",
    }
    if steps > 0:
        total = tokens_per_step * steps
        facts["run"] = (
            f"{steps:,} steps, {total / 1e6:,.1f} M tokens, {total * flops_per_token(config, seq_len):.2e} FLOPs"
        )
    _print_facts(str(name), {**facts, **_export_facts(config)})


def inspect_scaling(
    name: str,
    overrides: list[str],
    devices: list[int],
    *,
    strategy: StrategyName = "fsdp",
    gather: str = "both",
    gpu: str = "h100",
    utilisation: float = 0.45,
    int8: bool = False,
    json_file: str | None = None,
) -> None:
    """Print memory, communication and speed of training a config on several devices, on paper."""
    if not 0.0 < utilisation <= 1.0:
        raise UserError(f"--utilisation {utilisation}: a share above 0 and up to 1 is needed.")
    parsed = _parsed(name, overrides)
    rows, seq_len = parsed.data["batch_size"], parsed.data["seq_len"]
    weight = str(getattr(parsed.recipe, "weight", "none"))
    how: Any = {"rows": rows, "seq_len": seq_len, "weight": weight, "strategy": strategy, "gpu": GPUS[gpu]}
    how |= {
        "micro_batches": parsed.trainer.get("accumulate_grad_batches") or 1,
        "utilisation": utilisation,
        "int8": int8,
        "optimizer": parsed.optim.kind,
        "recomputes": parsed.activation_checkpointing,
    }
    memory = _training_memory(parsed, bf16=True)
    ways = ["latent", "levels"] if gather == "both" else [gather]
    found = [
        (way, estimate(parsed.model, memory, devices=n, gather=way, **how))
        for n in devices
        for way in (ways if strategy == "fsdp" else ["-"])
    ]
    title = (
        f"{name}, {strategy}, {GPUS[gpu].name} at {utilisation:.0%} of its peak, {how['micro_batches']} x {rows} x "
        f"{seq_len} tokens a device and step, {'int8 and bf16' if int8 else 'bf16'}"
    )
    console = TableConsole(width=120)
    console.print(_scaling_table(title, found))
    if parsed.recipe.begins_in_float and strategy == "fsdp" and gather != "latent":
        console.print(
            "This recipe begins in float, so latent weights travel; levels: quantize_from and quantizer_warmup of 0."
        )
    if json_file:
        lines = [
            {"gather": way, **dataclasses.asdict(e), "sent": e.sent, "tokens_per_s": e.tokens_per_s} for way, e in found
        ]
        Path(json_file).write_text(json.dumps({"title": title, "estimates": lines}, indent=1) + "\n", encoding="utf-8")


def _scaling_table(title: str, found: list[tuple[str, Estimate]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in (
        "GPUs", "gathered as", "memory", "weights in", "gradients", "activations", "computing", "sending", "tokens/s",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "gathered as" else "right")
    for way, e in found:
        table.add_row(
            f"{e.devices}", way, _size(e.memory), _size(e.gathered), _size(e.reduced), _size(e.activations_sent),
            f"{1e3 * e.compute_s:,.0f} ms", f"{1e3 * e.communication_s:,.0f} ms", f"{e.tokens_per_s:,.0f}",
        )  # fmt: skip
    return table


def inspect_run(path: Path) -> None:
    """Print config and quantized weights of a checkpoint, matrix by matrix."""
    content = read_checkpoint(path)
    model, _ = model_of(content, path)
    recipe = dict(content["bitnet"]["recipe"])
    counts = count_parameters(model.config)
    weight = recipe.get("weight", "none")
    facts = {
        "checkpoint": str(find_checkpoint(path)),
        "step": f"{content['global_step']:,}",
        "parameters": f"{counts.total:,} ({counts.linear:,} in the linears of the blocks)",
        "recipe": ", ".join(f"{key} = {value}" for key, value in recipe.items()),
        "bits per parameter": f"{bits_per_parameter(model.config, weight):.2f} packed",
    }
    if on_grid := quantized_layers(model):
        packed = pack(model, head="float16")
        stored = [*packed.parameters(), *packed.buffers()]
        facts["bits per parameter"] = f"{8 * sum(t.nbytes for t in stored) / counts.total:.2f} packed, all counted"
        _print_facts(str(path), facts)
        _print_grids(on_grid)
        return
    _print_facts(str(path), {**facts, **_export_facts(model.config)})
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("layer", "shape", "-1", "0", "+1", "scale"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, layer in low_bit_layers(model).items():
        levels = layer.levels()
        shares = [f"{share:.1%}" for share in level_shares(levels.q)]
        scale = levels.inv_scale.reciprocal().mean()  # of all groups
        table.add_row(name, f"{layer.out_features} x {layer.in_features}", *shares, f"{float(scale):.5f}")
    if table.row_count:
        TableConsole(width=110).print(table)


def _print_grids(layers: dict[str, FakeQuantizedLinear]) -> None:
    """The linears of a post-training recipe, one line each."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("layer", "shape", "bits", "scales", "zero points", "values used", "activations"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, layer in layers.items():
        q, scale, _ = layer.parts()
        act = "float" if layer.act is None else f"{layer.act.scheme.bits} bits, {layer.act.scheme.scale}"
        zero = "no" if layer.symmetric else "yes"
        shape = f"{q.shape[0]} x {q.shape[1]}"
        table.add_row(name, shape, str(layer.grid.bits), f"{scale.numel():,}", zero, str(len(q.unique())), act)
    TableConsole(width=110).print(table)


def print_packed(path: Path) -> None:
    """Print what a packed model file holds, from its header alone."""
    packed = read_header(path)
    counts = count_parameters(packed.config)
    by_format: dict[str, int] = {}
    sizes: dict[str, int] = {}
    codes = 0
    for name, entry in packed.tensors.items():
        role = "scales and norms"
        if name.endswith(".packed"):
            form = packed.forms[name.removesuffix(".packed")].format
            by_format[form] = by_format.get(form, 0) + 1
            role = f"packed weights ({form})"
        elif name.endswith(".codes"):
            codes += 1
            role = f"packed weights ({packed.recipe.get('bits')}-bit codes)"
        elif name.startswith(("tok_embeddings", "lm_head")):
            role = f"embedding and head ({packed.head}, {'tied' if packed.config.tie_embeddings else 'untied'})"
        sizes[role] = sizes.get(role, 0) + entry.nbytes
    acts = {str(form.act_bits) for form in packed.forms.values()}
    if codes:
        acts.add(str(packed.recipe.get("activation_bits", "none")))
    facts = {
        "format": f"packed model, version {FORMAT_VERSION}",
        "file": _size(packed.size),
        **{f"  {role}": _size(size) for role, size in sizes.items()},
        "  header and tokenizer": _size(packed.data_start),
        "parameters": f"{counts.total:,} ({counts.linear:,} in the linears of the blocks)",
        "bits per parameter": f"{8 * packed.size / counts.total:.2f} of the whole file",
        "layers": f"{len(packed.forms) + codes} packed, activation bits: {', '.join(sorted(acts))}",
        "recipe": ", ".join(f"{key} = {value}" for key, value in packed.recipe.items()) or "unknown",
        "config": ", ".join(f"{k} = {v}" for k, v in dataclasses.asdict(packed.config).items() if k in SHOWN_FIELDS),
    }
    _print_facts(str(path), facts)
