"""Time of a training step: ternary and binary against the float twin, in turn, in one process.

    python benchmarks/step_time.py [--config tiny] [--threads 1,2] [--steps 15] [--out FILE.json]

Full steps (forward, backward, clipping, AdamW) on random ids at the config's shapes, float32. One step of each recipe
after another, so that a slow moment of the machine meets all of them; medians, and the ratio to the float twin.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bitnet import BitNet, Transformer
from bitnet.loss import next_token_loss
from bitnet.training.cli import parse_config
from bitnet.training.optim import build_optimizer

RECIPES = {
    "float": BitNet(weight="none", act_bits="none"),
    "ternary": BitNet(weight="ternary"),
    "binary": BitNet(weight="binary"),
}


def seconds_per_step(config: str, steps: int) -> dict[str, list[float]]:
    parsed = parse_config(["--config", config])
    rows, seq_len = parsed.data["batch_size"], parsed.data["seq_len"]
    contestants = {}
    for name, recipe in RECIPES.items():
        torch.manual_seed(0)
        model = Transformer(parsed.model)
        recipe.prepare(model)
        contestants[name] = model, build_optimizer(model, parsed.optim)
    ids = torch.randint(parsed.model.vocab_size, (rows, seq_len + 1))
    batch = {"inputs": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for step in range(steps + 2):
        for name, (model, optimizer) in contestants.items():
            start = time.perf_counter()
            next_token_loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "config": args.config,
        "steps": args.steps,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": {},
    }
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        times = seconds_per_step(args.config, args.steps)
        medians = {name: statistics.median(t) for name, t in times.items()}
        pairs = {
            name: [a / b for a, b in zip(t, times["float"], strict=True)]
            for name, t in times.items()
            if name != "float"
        }
        result["threads"][threads] = {
            "median_ms": {name: 1e3 * m for name, m in medians.items()},
            "median_ratio_to_float": {name: statistics.median(p) for name, p in pairs.items()},
        }
        for name, median in medians.items():
            ratio = statistics.median(pairs[name]) if name in pairs else 1.0
            print(f"{threads} threads  {name:8} {1e3 * median:8.1f} ms per step   {ratio:.2f} x float")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
