"""What a run says at its beginning and leaves at its end: header, summary, loss curve and trit distribution."""

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from bitnet.estimate import count_parameters
from bitnet.layers import level_shares, low_bit_layers
from bitnet.training.progress import say
from bitnet.training.strategies import data_parallel_size

Curve = list[tuple[int, float]]


def read_curves(folder: Path, tags: tuple[str, ...]) -> dict[str, Curve]:
    """Scalars of a run from its TensorBoard events; after a resume, the later value of a step counts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    known = events.Tags()["scalars"]
    return {tag: sorted({e.step: e.value for e in events.Scalars(tag)}.items()) for tag in tags if tag in known}


def plot_loss(curves: dict[str, Curve], file: Path) -> None:
    """Bits per byte of training and validation over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for tag, style in (("train/bpb", {"alpha": 0.5, "linewidth": 1.0}), ("val/bpb", {"marker": "o", "markersize": 4})):
        if curve := curves.get(tag):
            steps, values = zip(*curve, strict=True)
            label = f"{tag.split('/')[0]} ({values[-1]:.3f})"
            axes.plot(steps, values, label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="bits per byte", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


def plot_quantized(model: torch.nn.Module, file: Path) -> None:
    """Share of -1, 0 and +1 in every low-bit matrix, one stacked bar each."""
    from matplotlib.figure import Figure

    names, shares = [], []
    for name, layer in low_bit_layers(model).items():
        names.append(name.removeprefix("layers.").replace("attention.", "").replace("feed_forward.", ""))
        shares.append(level_shares(layer.quantized_weight()[0]))
    if not names:
        return
    figure = Figure(figsize=(max(6.0, 0.22 * len(names) + 1.5), 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    bottom = np.zeros(len(names))
    for value, share, color in zip(
        ("-1", "0", "+1"), np.array(shares).T, ("#3b6fb6", "#d0d0d0", "#c8553d"), strict=True
    ):
        axes.bar(range(len(names)), share, bottom=bottom, label=value, color=color, width=0.9)
        bottom += share
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set(ylabel="share of weights", title="Quantized weights by layer", ylim=(0, 1), xlim=(-0.6, len(names) - 0.4))
    figure.legend(loc="outside right upper")
    figure.savefig(file)


def command_prefix() -> str:
    """How to call this installation: ``bitnet`` when that is on the PATH, else its full path."""
    script = Path(sys.executable).with_name("bitnet")
    if shutil.which("bitnet") and Path(shutil.which("bitnet") or "").resolve() == script.resolve():
        return "bitnet"
    if not script.exists():
        return f"{Path(sys.executable).name} -m bitnet"
    here = Path.cwd()
    return str(script.relative_to(here)) if script.is_relative_to(here) else str(script)


class RunReport(Callback):
    """Header, summary.json, loss.png and weights.png of a run folder."""

    def __init__(self) -> None:
        self._started, self._before = time.monotonic(), 0.0
        self._first_step: int | None = None
        self.waits_for_validation = False
        """Whether all steps were made before, and the validation after the last one was not."""

    def _seconds(self) -> float:
        """Of this session."""
        return time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._before + self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["seconds"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._started = time.monotonic()
        if not trainer.is_global_zero:
            return
        config, counts = pl_module.config, count_parameters(pl_module.config)
        recipe = pl_module.recipe
        kind = getattr(recipe, "weight", type(recipe).__name__)
        kind = "float" if kind == "none" else kind
        data = pl_module.data.summary()
        train_bytes = sum(t["text_bytes"] for t in data["train"])
        train_tokens = sum(t["tokens"] for t in data["train"])
        rows = pl_module.data.batch_size * trainer.accumulate_grad_batches * data_parallel_size(trainer)
        lines = [
            f"model   {counts.total / 1e6:.2f} M parameters, {counts.linear / 1e6:.2f} M of them {kind}: "
            f"{config.n_layers} layers, dim {config.dim}, ffn {config.ffn_dim}, {config.vocab_size} tokens",
            f"data    {', '.join(data['paths'])}: {train_bytes / 1e6:.2f} MB, {train_tokens:,} tokens; "
            f"{data['val']['text_bytes'] / 1e6:.2f} MB held out; "
            f"sha256 {data['sha256'][0][:12]}, Python {data['python']}",
            f"step    {rows} rows of {pl_module.data.seq_len} tokens: {rows * pl_module.data.seq_len:,} tokens",
            f"run     {trainer.default_root_dir}",
        ]
        obstacles = config.export_obstacles() if low_bit_layers(pl_module.transformer) else {}
        fits = [name for name, why in obstacles.items() if why is None]
        if obstacles:
            lines.append(f"export  these sizes suit {'; '.join(fits) if fits else 'no format'}")
        lines += [f"        not {name}: {why}" for name, why in obstacles.items() if why]
        for line in lines:
            say(trainer, line)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._first_step = trainer.global_step

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        if trainer.logger is not None:
            trainer.logger.save()
        if self._first_step is None and trainer.world_size == 1 and trainer.limit_val_batches:
            validated = read_curves(Path(trainer.default_root_dir), ("val/loss",)).get("val/loss", [(-1, 0.0)])
            self.waits_for_validation = validated[-1][0] < trainer.global_step
        if not self.waits_for_validation:
            self._write(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate" and self.waits_for_validation:
            self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: Any) -> None:
        folder = Path(trainer.default_root_dir)
        if trainer.logger is not None:
            trainer.logger.save()  # or what was logged last may not be in the file yet
        curves = read_curves(
            folder,
            (
                "train/loss",
                "train/bpb",
                "val/loss",
                "val/bpb",
                "perf/tokens_per_s",
                "perf/communication_share",
                "quant/zero_fraction",
                "quant/flip_rate",
            ),
        )
        plot_loss(curves, folder / "loss.png")
        if trainer.world_size == 1:
            plot_quantized(pl_module.transformer, folder / "weights.png")
        # Batches of questions without answers have no loss, and JSON no NaN.
        found = {tag: [v for _, v in curve] for tag, curve in curves.items()}
        summary = {
            "steps": trainer.global_step,
            "seconds": round(self._before + self._seconds(), 1),
            "parameters": count_parameters(pl_module.config).total,
            "figures": {tag: round(v[-1], 6) for tag, v in found.items() if v and math.isfinite(v[-1])},
            "mean_flip_rate": round(float(np.mean([v for _, v in curves.get("quant/flip_rate", [(0, 0.0)])])), 8),
            "best_val_bpb": min((round(v, 6) for v in found.get("val/bpb", []) if math.isfinite(v)), default=None),
            "data": pl_module.data.summary(),
            "preparation": pl_module.preparation,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        steps = 0 if self._first_step is None else trainer.global_step - self._first_step
        done = f"{steps} steps in {self._seconds():.0f} s"
        if self._before:
            done += f", {summary['steps']} in {summary['seconds']:.0f} s with those of before"
        for line in _closing_lines(folder, summary, done):
            say(trainer, line)


def _closing_lines(folder: Path, summary: dict[str, Any], done: str) -> list[str]:
    figures = summary["figures"]
    bitnet = command_prefix()
    lines = [
        "",
        f"Done: {done}; everything is in {folder}/ (see loss.png, weights.png)",
    ]
    if "val/bpb" in figures:
        lines.append(f"  validation   {figures['val/loss']:.4f} nats per token, {figures['val/bpb']:.4f} bits per byte")
    if "quant/zero_fraction" in figures:
        zero, flips = figures["quant/zero_fraction"], summary["mean_flip_rate"]
        lines.append(f"  weights      {zero:.1%} zeros; a step changed {flips:.3%} of them on average")
    if "perf/tokens_per_s" in figures:
        lines.append(f"  speed        {figures['perf/tokens_per_s']:,.0f} tokens/s")
    if "perf/communication_share" in figures:
        lines.append(f"  collectives  {figures['perf/communication_share']:.1%} of the time of the profiled steps")
    lines += [
        "Next:",
        f'  {bitnet} generate {folder} --prompt "The" --max_new_tokens 100',
        f"  {Path(bitnet).with_name('tensorboard') if '/' in bitnet else 'tensorboard'} --logdir {folder.parent}",
        f"  {bitnet} fit --config tiny --data.path my_texts/ --trainer.max_steps 500",
    ]
    return lines
