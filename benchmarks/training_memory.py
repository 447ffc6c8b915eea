"""Measured peak memory of training steps against the estimate of ``bitnet inspect``.

    python benchmarks/training_memory.py [--switches] [--out benchmarks/results/training_memory_cpu_DATE.json]

``--switches`` measures the settings that save memory instead, each alone and all together.
Each shape runs in a process of its own; memory is the peak resident set minus what the process held before the model
was built. MALLOC_MMAP_THRESHOLD_ makes the C library give the memory of each tensor back at once, so that the resident
set is what is alive; the last column shows the peak without it, when the heap keeps what it has.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {"dim": 256, "n_layers": 4, "n_heads": 4, "ffn_dim": 512, "vocab_size": 2048, "rows": 8, "seq_len": 256},
    "deep": {"dim": 384, "n_layers": 12, "n_heads": 6, "ffn_dim": 1024, "vocab_size": 4096, "rows": 4, "seq_len": 512},
    "wide": {
        "dim": 1024,
        "n_layers": 2,
        "n_heads": 16,
        "ffn_dim": 2816,
        "vocab_size": 8192,
        "rows": 2,
        "seq_len": 1024,
    },
    "vocabulary": {
        "dim": 256,
        "n_layers": 2,
        "n_heads": 4,
        "ffn_dim": 512,
        "vocab_size": 32000,
        "rows": 4,
        "seq_len": 512,
    },
}

SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "loss_chunk": {"loss_chunk": 256},
    "checkpointing": {"activation_checkpointing": True},
    "from float": {"begins_in_float": True},
    "muon": {"optimizer": "muon"},
    "adafactor": {"optimizer": "adafactor"},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "chunk, checkpointing": {"loss_chunk": 256, "activation_checkpointing": True},
    "the same, muon": {"loss_chunk": 256, "activation_checkpointing": True, "optimizer": "muon"},
    "the same, adafactor": {"loss_chunk": 256, "activation_checkpointing": True, "optimizer": "adafactor"},
    "the same, adamw8bit": {"loss_chunk": 256, "activation_checkpointing": True, "optimizer": "adamw8bit"},
}
"""Arguments of ``training_memory`` by the name of a switch."""


def measure(shape: dict[str, int], weight: str, switch: str = "plain") -> dict[str, float]:
    """Train three steps of this shape here; bytes measured and estimated."""
    import torch

    from bitnet import BitNet, ModelConfig, OptimConfig, Transformer
    from bitnet.estimate import training_memory
    from bitnet.layers import low_bit_layers
    from bitnet.loss import next_token_loss
    from bitnet.memory import peak_bytes
    from bitnet.training.optim import build_optimizer

    torch.set_num_threads(1)
    sizes, options = dict(shape), SWITCHES[switch]
    rows, seq_len = sizes.pop("rows"), sizes.pop("seq_len")
    config = ModelConfig(**sizes, max_seq_len=seq_len)
    act_bits = "none" if weight == "none" else 8

    def train(config: ModelConfig, rows: int, steps: int) -> None:
        model = Transformer(config)
        BitNet(weight=weight, act_bits=act_bits).prepare(model)
        model.loss_chunk = options.get("loss_chunk")
        model.recomputes_blocks = options.get("activation_checkpointing", False)
        optimizer = build_optimizer(model, OptimConfig(kind=options.get("optimizer", "adamw")))
        ids = torch.randint(config.vocab_size, (rows, config.max_seq_len + 1))
        layers = low_bit_layers(model).values()
        for step in range(steps):
            for layer in layers if options.get("begins_in_float") else ():
                layer.warmup = min(step / 2, 1.0)  # in float, half blended in, low-bit
            next_token_loss(model, {"inputs": ids[:, :-1], "targets": ids[:, 1:]}).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    # The pages of libraries that a first step touches are not what the model takes.
    train(ModelConfig(vocab_size=64, dim=32, n_layers=1, n_heads=2, ffn_dim=64, max_seq_len=32), rows=2, steps=2)
    before = peak_bytes()
    train(config, rows, steps=3)
    after = peak_bytes()
    estimate = training_memory(
        config, weight=weight, act_bits=act_bits, rows=rows, seq_len=seq_len, bf16=False, **options
    )
    return {"measured": after - before, "estimated": estimate.total}


def run(command: list[str], **environment: str) -> dict[str, float]:
    """The JSON that ``--one`` prints in a fresh process."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--switches", action="store_true", help="measure the settings that save memory")
    parser.add_argument("--one", nargs="+", metavar=("SHAPE", "WEIGHT"), help="measure one shape in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(SHAPES[args.one[0]], *args.one[1:])))
        return
    cases = [(weight, "plain") for weight in ("ternary", "none")]
    if args.switches:
        cases = [("ternary", switch) for switch in SWITCHES]
    rows = []
    for name in SHAPES:
        for weight, switch in cases:
            command = [sys.executable, __file__, "--one", name, weight, switch]
            result = run(command, MALLOC_MMAP_THRESHOLD_="65536")
            heap = run(command)["measured"]
            ratio = result["estimated"] / result["measured"]
            case = {"shape": name, "weight": weight, "switch": switch}
            rows.append({**case, **result, "ratio": ratio, "measured_with_heap": heap})
            megabytes = f"{result['measured'] / 1e6:8.0f} MB measured {result['estimated'] / 1e6:8.0f} MB estimated"
            reserve = f"{heap / 1e6:8.0f} MB with the heap's reserve"
            print(f"{name:12} {weight:8} {switch:20} {megabytes}   ratio {ratio:.2f}   {reserve}", flush=True)
    if args.out:
        import torch

        machine = {"torch": torch.__version__, "machine": platform.machine(), "python": platform.python_version()}
        args.out.write_text(json.dumps({"shapes": SHAPES, "rows": rows, **machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
