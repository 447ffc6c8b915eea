"""Every post-training recipe on one small model, with the figures that tell a working one from a stub.

The model: 0.36 M parameters (dim 96, 3 blocks, bytes as tokens, context 96), trained for 1,200 steps on the source of
Python's standard library. Perplexities are of 64 windows of held-out files. Groups have 32 inputs.

    python benchmarks/post_training.py --seeds 0,1,2 --json benchmarks/results/post_training_toy.json

The tests run the same experiments with one seed and assert what held for all of these (tests/recipes/).
"""

import argparse
import copy
import functools
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.loss import next_token_loss
from bitnet.model import Transformer
from bitnet.recipes import (
    AWQ,
    GPTQ,
    LLMQAT,
    PEQA,
    QAT,
    RTN,
    BitNet,
    EfficientQAT,
    LLMInt8,
    LoftQ,
    QALoRA,
    QLoRA,
    Recipe,
    SmoothQuant,
    SpQR,
    ZeroQuant,
)  # fmt: skip
from bitnet.synthesis import synthesize

T, GROUP, WINDOWS = 96, 32, 64
CONFIG = ModelConfig(
    vocab_size=256, dim=96, n_layers=3, n_heads=4, ffn_dim=256, max_seq_len=T + 1, activation="silu", sub_norm=False
)


@functools.cache
def _text(held_out: bool) -> Tensor:
    """Bytes of the .py files of the standard library; every tenth file is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    chosen = [f for i, f in enumerate(files) if (i % 10 == 0) == held_out]
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in chosen)), dtype=torch.uint8).long()


def rows(count: int, generator: torch.Generator) -> Tensor:
    """``count`` random pieces of training text, int64 (count, T + 1)."""
    text = _text(False)
    starts = torch.randint(len(text) - T - 1, (count, 1), generator=generator)
    return text[starts + torch.arange(T + 1)]


def validation() -> Tensor:
    """Equally spaced pieces of held-out text, int64 (WINDOWS, T + 1)."""
    text = _text(True)
    return text[torch.linspace(0, len(text) - T - 2, WINDOWS).long()[:, None] + torch.arange(T + 1)]


def as_batch(ids: Tensor) -> dict[str, Tensor]:
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


@torch.no_grad()
def perplexity(model: Transformer) -> float:
    """Of the validation windows, 16 at a time, in the model's own mode set to eval."""
    mode = model.training
    model.eval()
    losses = [float(next_token_loss(model, as_batch(part))) for part in validation().split(16)]
    model.train(mode)
    return math.exp(sum(losses) / len(losses))


def train(
    model: Transformer,
    steps: int,
    lr: float,
    batches: Callable[[int], Tensor],
    loss: Callable[[Transformer, dict[str, Tensor]], Tensor] = next_token_loss,
) -> Transformer:
    """AdamW with cosine decay to zero on what requires gradients; ``batches(step)`` gives ids (B, T + 1)."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for step in range(steps):
        warm = min(1.0, (step + 1) / min(50, max(1, steps // 10)))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (1 + math.cos(math.pi * step / steps)) / 2
        loss(model, as_batch(batches(step))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def fresh_rows(seed: int, count: int = 16) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return lambda step: rows(count, generator)


def some_of(data: Tensor, seed: int, count: int = 16) -> Callable[[int], Tensor]:
    """Batches drawn from ``data`` (N, T + 1)."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return lambda step: data[torch.randint(len(data), (count,), generator=generator)]


def parent(seed: int) -> Transformer:
    """The float model."""
    torch.manual_seed(seed)
    return train(Transformer(CONFIG), 1200, 4e-3, fresh_rows(seed, 24))


def calibration(seed: int, batches: int = 24, size: int = 8) -> list[Tensor]:
    """Batches of token ids (size, T)."""
    generator = torch.Generator().manual_seed(3000 + seed)
    return [rows(size, generator)[:, :-1] for _ in range(batches)]


def applied(model: Transformer, recipe: Recipe, batches: Iterable[Tensor] = ()) -> Transformer:
    """A copy of ``model`` under ``recipe``."""
    new = copy.deepcopy(model)
    recipe.prepare(new, batches)
    return new.eval()


def only_linears(model: Transformer) -> Transformer:
    """Train nothing but the matrices of the blocks, so that no other parameter can make up for what they lose."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("layers.") and parameter.ndim == 2)
    return model


def recovered(before: float, after: float, exact: float) -> float:
    """Share of the gap between the rounded and the float model that is closed."""
    return (before - after) / (before - exact)


# ---- experiments: float model, seed -> figures


def rounding(model: Transformer, seed: int) -> dict[str, float]:
    """Perplexity after rounding, and after rounding with an eye on activations."""
    found = {"float": perplexity(model)}
    for bits in (8, 4, 3, 2):
        found[f"rtn{bits}"] = perplexity(applied(model, RTN(bits=bits, group_size=GROUP)))
    found["ternary_absmean"] = perplexity(applied(model, BitNet(act_bits="none")))
    data = calibration(seed, 16)
    for bits in (3, 2):
        found[f"gptq{bits}"] = perplexity(applied(model, GPTQ(bits=bits, group_size=GROUP), data))
        found[f"awq{bits}"] = perplexity(applied(model, AWQ(bits=bits, group_size=GROUP), data))
        found[f"spqr{bits}"] = perplexity(applied(model, SpQR(bits=bits, group_size=16), data))
    zero = ZeroQuant(bits=4, group_size=GROUP, block_steps=0)
    found["zeroquant4_0"] = perplexity(applied(model, zero, data))
    found["zeroquant4"] = perplexity(applied(model, ZeroQuant(bits=4, group_size=GROUP, block_lr=1e-4), data))
    return found


@torch.no_grad()
def with_outliers(model: Transformer, seed: int, factor: float = 80.0) -> Transformer:
    """The same function with three large channels behind every norm."""
    new = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(4000 + seed)
    for block in new.layers:
        for norm, readers in block.norm_groups():
            channels = torch.randperm(CONFIG.dim, generator=generator)[:3]
            norm.weight[channels] *= factor
            for linear in readers:
                linear.weight[:, channels] /= factor
    return new


def smoothing(model: Transformer, seed: int) -> dict[str, float]:
    """SmoothQuant on the model with outlier channels."""
    data, large = calibration(seed, 8), with_outliers(model, seed)
    found = {"float": perplexity(model), "float_outliers": perplexity(large)}
    for level in ("o1", "o2", "o3"):
        for alpha in ("none", 0.5):
            recipe = SmoothQuant(level=level, alpha=alpha)
            found[f"{level}_{alpha}"] = perplexity(applied(large, recipe, data))
            found[f"{level}_{alpha}_clean"] = perplexity(applied(model, recipe, data))
    found["llm_int8"] = perplexity(applied(large, LLMInt8()))
    found["rtn_w8a8"] = perplexity(applied(large, RTN(bits=8, group_size=0, symmetric=True, activation_bits=8)))
    return found


def qat(model: Transformer, seed: int) -> dict[str, float]:
    """Quantization-aware training of the linears alone, 2 bits in groups."""
    exact = perplexity(model)
    recipe = QAT(bits=2, group_size=GROUP)
    found = {"float": exact, "rtn": perplexity(applied(model, recipe))}
    for ranges in ("minmax", "learned"):
        trained = applied(model, QAT(bits=2, group_size=GROUP, ranges=ranges, train="linears"))
        train(trained, 120, 1e-3, fresh_rows(seed))
        found[ranges] = perplexity(trained)
        found[f"{ranges}_recovered"] = recovered(found["rtn"], found[ranges], exact)
    static = QAT(bits=4, group_size=GROUP, activation_bits=4, act_scale="static", act_momentum=0.1)
    calibrated = applied(model, static)
    calibrated.train()
    with torch.no_grad():
        for batch in calibration(seed, 30):
            calibrated(batch)
    calibrated.eval()
    found["w4a4_rtn"] = perplexity(calibrated)
    found["w4a4"] = perplexity(train(applied(model, static), 100, 1e-3, fresh_rows(seed)))
    student = applied(model, BitNet(act_bits="none"))
    found["ternary_rounded"] = perplexity(student)
    found["ternary_continued"] = perplexity(train(student, 120, 1e-3, fresh_rows(seed)))
    return found


def blocks(model: Transformer, seed: int) -> dict[str, float]:
    """EfficientQAT and PEQA, 2 bits in groups."""
    data = calibration(seed)
    options: dict[str, Any] = {"bits": 2, "group_size": GROUP}
    found = {"float": perplexity(model), "rtn": perplexity(applied(model, RTN(**options)))}
    recipe = EfficientQAT(**options, block_steps=100, block_lr=4e-4, block_grid_lr=1e-3)
    trained = applied(model, recipe, data)
    found["block_ap"] = perplexity(trained)
    for number, (before, after) in enumerate(recipe.found["block_errors"]):
        found[f"block{number}_ratio"] = after / before
    found["efficient_qat"] = perplexity(train(trained, 60, 1e-3, fresh_rows(seed)))
    found["peqa"] = perplexity(train(applied(model, PEQA(**options)), 60, 1e-3, fresh_rows(seed)))
    return found


def llm_qat(model: Transformer, seed: int) -> dict[str, float]:
    """Training on text of the model's own, with its own predictions as labels; only the linears are trained."""
    exact = perplexity(model)
    recipe = LLMQAT(bits=2, group_size=GROUP, symmetric=False, activation_bits=8, kv_bits="none")
    found = {"float": exact, "rtn": perplexity(applied(model, recipe))}
    generator = torch.Generator().manual_seed(5000 + seed)
    made = functools.partial(synthesize, model, sequences=384, length=T + 1, batch_size=128, seed=seed)
    texts = {
        "hybrid": torch.tensor(list(made())),
        "greedy": torch.tensor(list(made(sampled=False))),
        "random": torch.randint(256, (384, T + 1), generator=generator),
        "real": rows(384, generator),
    }
    for name, labels in (
        ("hybrid", "soft"), ("greedy", "soft"), ("random", "soft"), ("real", "soft"), ("hybrid", "hard"),
    ):  # fmt: skip
        student = only_linears(applied(model, recipe))
        loss = recipe.loss if labels == "soft" else next_token_loss
        train(student, 100, 1e-3, some_of(texts[name], seed), loss)
        found[f"{name}_{labels}"] = recovered(found["rtn"], perplexity(student), exact)
    return found


def adapters(model: Transformer, seed: int) -> dict[str, float]:
    """QLoRA and LoftQ, before and after training the adapters alone."""
    found = {"float": perplexity(model)}
    for name, quantizer, bits in (("nf4", "normal", 4), ("nf2", "normal", 2), ("unif2", "uniform", 2)):
        options: dict[str, Any] = {
            "quantizer": quantizer, "bits": bits, "group_size": GROUP, "rank": 8, "double_quantization": False,
        }  # fmt: skip
        for start, recipe in (
            ("zero", QLoRA(**options, alpha=8.0)),
            ("loftq1", LoftQ(**options, rounds=1)),
            ("loftq5", LoftQ(**options, rounds=5)),
        ):
            begun = applied(model, recipe)
            found[f"{name}_{start}_init"] = perplexity(begun)
            found[f"{name}_{start}"] = perplexity(train(begun, 60, 1e-3, fresh_rows(seed)))
    merged = applied(model, recipe_qa := QALoRA(bits=2, group_size=GROUP, rank=8), calibration(seed, 8))
    found["qa_lora_init"] = perplexity(merged)
    train(merged, 60, 1e-3, fresh_rows(seed))
    found["qa_lora"] = perplexity(merged)
    recipe_qa.finalize(merged)
    found["qa_lora_merged"] = perplexity(merged)
    return found


EXPERIMENTS = {f.__name__: f for f in (rounding, smoothing, qat, blocks, llm_qat, adapters)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(EXPERIMENTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    for seed in map(int, args.seeds.split(",")):
        model = parent(seed)
        print(f"seed {seed}: float {perplexity(model):.4f}", flush=True)
        for name in args.only.split(","):
            started = time.monotonic()
            figures = EXPERIMENTS[name](model, seed)
            results.setdefault(name, {})[seed] = figures
            print(f"  {name} ({time.monotonic() - started:.0f} s)", flush=True)
            for key, value in figures.items():
                print(f"    {key:24} {value:.4f}", flush=True)
    if args.json:
        about = {"torch": torch.__version__, "python": platform.python_version(), "threads": args.threads}
        Path(args.json).write_text(json.dumps({"about": about, "by_seed": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
