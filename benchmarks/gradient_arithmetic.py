"""What gradients of 8 and 16 bits do to the loss: the same run, with each product of the backward pass on int8 units.

    python benchmarks/gradient_arithmetic.py --data PATH --out FILE.json [--seeds 3] [--steps 500] [--threads 1]

A ternary model of 0.85 M parameters in the blocks; validation loss at the end of each run, mean over seeds, the paired
difference to float gradients with its spread over seeds, and that of the same run with sums in another order.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bitnet.training.cli import main as fit

OTHER_ORDER = "float, two threads"
"""The same as float with its sums in another order: what a difference has to exceed to mean something."""

VARIANTS: dict[str, dict[str, str]] = {
    "float": {},
    OTHER_ORDER: {},
    "input int8": {"input_gradient": "int8"},
    "weight int8": {"weight_gradient": "int8"},
    "both int8": {"input_gradient": "int8", "weight_gradient": "int8"},
    "both int16": {"input_gradient": "int16", "weight_gradient": "int16"},
}
MODEL = {"dim": 128, "n_layers": 4, "n_heads": 4, "ffn_dim": 384, "dropout": 0.0}


def options(data: str, steps: int, seed: int, folder: Path, arithmetic: dict[str, str]) -> list[str]:
    given: dict[str, Any] = {
        "data.path": data, "data.vocab_size": 2048, "data.seq_len": 128, "data.batch_size": 16,
        "seed_everything": seed, "data.seed": seed, "model.optim.kind": "adamw", "model.optim.lr": 3e-3,
        "model.schedule.kind": "linear", "model.recipe.quantize_from": 0.0, "model.recipe.quantizer_warmup": 0,
        "trainer.max_steps": steps, "trainer.val_check_interval": steps, "trainer.log_every_n_steps": 50,
        "trainer.limit_val_batches": 50, "trainer.default_root_dir": folder, "trainer.accelerator": "cpu",
    }  # fmt: skip
    given |= {f"model.config.{key}": value for key, value in MODEL.items()}
    given |= {f"model.arithmetic.{key}": value for key, value in arithmetic.items()}
    return ["fit", "--config", "tiny", *(f"--{key}={value}" for key, value in given.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="builtin:python")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="variants beside float, by name, with semicolons between them")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: a spread needs at least 2")
    torch.set_num_threads(args.threads)
    chosen = {n: how for n, how in VARIANTS.items() if not args.only or n == "float" or n in args.only.split(";")}
    losses: dict[str, list[float]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.seeds):
            for name, arithmetic in chosen.items():
                torch.set_num_threads(2 if name == OTHER_ORDER else args.threads)
                folder = Path(scratch) / f"{name.replace(' ', '_')}_{seed}"
                assert fit(options(args.data, args.steps, seed, folder, arithmetic)) == 0
                summary = json.loads((folder / "summary.json").read_text())
                losses[name].append(summary["figures"]["val/loss"])
    table = {}
    for name, found in losses.items():
        away = [a - b for a, b in zip(found, losses["float"], strict=True)]
        table[name] = {"val_loss": found, "mean": statistics.mean(found), "mean_difference": statistics.mean(away)}
        table[name]["spread_of_difference"] = statistics.stdev(away)
        print(f"{name:12} {table[name]['mean']:.4f}  {table[name]['mean_difference']:+.4f} nats  {away}")
    spread = statistics.stdev(losses["float"])
    result = {"model": MODEL, "steps": args.steps, "torch": torch.__version__, "spread_of_seeds": spread, "runs": table}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
