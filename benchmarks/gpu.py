"""Everything that wants a GPU, in one call of less than ten minutes: tests, kernels, a whole model and its bf16 twin.

    python benchmarks/gpu.py --out benchmarks/results [--arena FOLDER]     # on a machine with CUDA
    python benchmarks/gpu.py --out /tmp/dry --dry_run [--arena FOLDER]     # anywhere: the same steps, small, on the CPU

Each step is a process of its own, writes its own files and says how it ended; one that fails, or takes longer than
``--limit``, does not stop the others, but the exit code is 1. Needs torch, triton, numpy, rich, matplotlib, tokenizers,
lightning, jsonargparse and pytest with hypothesis; no network. ``--arena`` takes a folder that ``benchmarks/arena.py
--prepare`` has made, and trains arena L.
"""

import argparse
import collections
import datetime
import functools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

BITNET_2B = {
    "vocab_size": 128_256, "dim": 2560, "n_layers": 30, "n_heads": 20, "n_kv_heads": 5, "ffn_dim": 6912,
    "max_seq_len": 1024, "activation": "relu2", "sub_norm": True, "tie_embeddings": True,
}  # fmt: skip
SMALL = {**BITNET_2B, "vocab_size": 512, "dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 256}


def environment() -> dict[str, str]:
    """For programs that are started from here: the packages need not be installed."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_tests(out: Path, dry: bool) -> dict[str, Any]:
    """The kernel tests on the device, and packed models against training."""
    targets = [
        "tests/kernels/test_triton_numbers.py",
        "tests/kernels/test_training_ops.py",
        "tests/kernels/test_triton_levels.py",
        "tests/kernels/test_triton_decode.py",
        "tests/inference/test_gpu.py",
    ]
    env = environment() | {"TRITON_INTERPRET": "1" if dry else "0"}
    side_by_side = ["-n", "8", "-p", "no:benchmark"] if find_spec("xdist") else []  # kernels take long to compile
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *side_by_side, *targets]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    (out / "tests.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-1500:]
    return {"summary": next(line for line in reversed(done.stdout.splitlines()) if " in " in line and "passed" in line)}


def bench_kernels(out: Path, dry: bool, tune: bool = False) -> dict[str, Any]:
    """The packed products; with the shipped tiles, or with those that were measured first."""
    from bitnet_kernels import configurations
    from bitnet_kernels import tuning as tiles
    from bitnet_kernels.bench import bench_kernels as run

    shapes, tokens = ("64x256,300x500", [1, 4]) if dry else ("2560x2560,2560x6912,4096x14336", [1, 16, 64, 256, 2048])
    name, figures = "kernels_tuned" if tune else "kernels", {}
    if tune and not dry:
        parsed = [(int(n), int(k)) for n, _, k in (shape.partition("x") for shape in shapes.split(","))]
        for format in ("ternary2", "binary1"):
            for count in tokens:
                found = tiles.tune(parsed, [count], format, budget=24)
                figures |= {key: str(tile) for key, tile in found.items()}
                (out / "tiles.json").write_text(Path(configurations.tuned_file()).read_text())
    results = run(
        shapes, tokens, device="cpu" if dry else "cuda", json_file=str(out / f"{name}.json"),
        plot=str(out / f"{name}.png"),
    )  # fmt: skip
    return {"measured": len(results), **figures}


def decode_whole_model(out: Path, dry: bool) -> dict[str, Any]:
    """Tokens per second of the packed model and of the same shape in bf16, both decoded from a CUDA graph."""
    import torch

    from bitnet.config import ModelConfig
    from bitnet.generation import prefill
    from bitnet.graph import GraphDecoder
    from bitnet.inference.bench import random_packed
    from bitnet.model import Transformer, without_memory

    device, tokens = ("cpu", 4) if dry else ("cuda", 128)
    config = ModelConfig(**(SMALL if dry else BITNET_2B))
    figures: dict[str, Any] = {}

    def speed(model: Transformer) -> float:
        with torch.inference_mode():
            cache = model.new_cache(1, 2 * tokens + 8)
            token = prefill(model, torch.zeros(1, 4, dtype=torch.int64, device=device), cache).argmax(-1, keepdim=True)
            decode = GraphDecoder(model, cache)
            for _ in range(4):
                token = decode(token).argmax(-1, keepdim=True)
            start = time.perf_counter()
            for _ in range(tokens):
                token = decode(token).argmax(-1, keepdim=True)
            int(token)
            return tokens / (time.perf_counter() - start)

    for head in ("int8", "bfloat16"):
        model = random_packed(config, "ternary", head).to(device)
        for module in model.modules():
            if module.__class__.__name__ == "RMSNorm":
                module.to(torch.float32 if dry else torch.bfloat16)
        stored = sum(b.numel() * b.element_size() for b in [*model.parameters(), *model.buffers()])
        figures[f"packed_{head}_head"] = {"tokens_per_s": speed(model), "bytes": stored}
        del model
    with without_memory():
        twin = Transformer(config)
    twin = twin.to_empty(device=device).to(torch.float32 if dry else torch.bfloat16).eval()
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    stored = sum(p.numel() * p.element_size() for p in twin.parameters())
    figures["twin_bf16"] = {"tokens_per_s": speed(twin), "bytes": stored}
    (out / "decode.json").write_text(json.dumps(figures, indent=1))
    return figures


def profile(out: Path, dry: bool) -> dict[str, Any]:
    """Which kernels a training step and a decoded token are made of, and how long the GPU is busy with them."""
    import torch

    from bitnet.config import ModelConfig, OptimConfig
    from bitnet.generation import prefill
    from bitnet.graph import GraphDecoder
    from bitnet.inference.bench import random_packed
    from bitnet.training.bench import Contestant

    device = "cpu" if dry else "cuda"
    kind = torch.autograd.DeviceType.CPU if dry else torch.autograd.DeviceType.CUDA
    activity = torch.profiler.ProfilerActivity.CPU if dry else torch.profiler.ProfilerActivity.CUDA
    figures, lines = {}, []

    def look(name: str, work: Callable[[], Any]) -> None:
        for _ in range(3):
            work()
        start = time.perf_counter()
        int(work())  # waits for the GPU
        wall = time.perf_counter() - start
        with torch.profiler.profile(activities=[activity]) as found:
            int(work())
        counts: collections.Counter[str] = collections.Counter()
        times: collections.Counter[str] = collections.Counter()
        for event in found.events():
            if event.device_type == kind:
                counts[event.name] += 1
                times[event.name] += event.cpu_time_total if dry else event.device_time_total
        figures[name] = {"wall_ms": wall * 1e3, "kernels": counts.total(), "busy_ms": times.total() / 1e3}
        lines.append(f"{name}: {figures[name]}")
        lines.extend(f"{us / 1e3:9.3f} ms {counts[n]:6} x  {n[:120]}" for n, us in times.most_common(25))

    sizes = SHAPES["125m"] if not dry else {"dim": 64, "n_layers": 1, "n_heads": 4, "ffn_dim": 128, "rows": 1}
    given = {key: value for key, value in sizes.items() if key != "rows"}
    vocab, rows, tokens = (512, 1, 64) if dry else (8192, 16, 512)
    config = ModelConfig(vocab_size=vocab, max_seq_len=tokens, **given)
    ids = torch.randint(vocab, (rows, tokens + 1), device=device)
    batch = {"inputs": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    for name in ("float", "ternary"):
        contestant = Contestant(name, config, OptimConfig(kind="muon"), device, False)
        look(f"a step of {name}", functools.partial(contestant.step, batch, not dry))
        del contestant
    with torch.inference_mode():
        model = random_packed(ModelConfig(**(SMALL if dry else BITNET_2B)), "ternary", "int8").to(device)
        cache = model.new_cache(1, 64)
        prefill(model, torch.zeros(1, 4, dtype=torch.int64, device=device), cache)
        decode = GraphDecoder(model, cache)
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        look("a token of the 2B shape", lambda: decode(token).argmax())
    (out / "profile.txt").write_text("\n".join(lines) + "\n")
    return figures


SHAPES = {
    "30m": {"dim": 640, "n_layers": 6, "n_heads": 10, "ffn_dim": 1792, "rows": 16},
    "125m": {"dim": 768, "n_layers": 12, "n_heads": 12, "ffn_dim": 2048, "rows": 8},
    "350m": {"dim": 1024, "n_layers": 24, "n_heads": 16, "ffn_dim": 2816, "rows": 4},
}


def train_steps(out: Path, dry: bool, names: str = "float,ternary,ternary_int8", compiled: bool = False) -> Any:
    """Step time and memory at 2,048 tokens a row, bf16: the float twin, and others beside it."""
    import dataclasses

    from bitnet.config import ModelConfig, OptimConfig
    from bitnet.training.bench import measure

    figures: dict[str, Any] = {}
    for shape, sizes in SHAPES.items():
        rows, tokens = sizes["rows"], 64 if dry else 2048
        given = {key: value for key, value in sizes.items() if key != "rows"}
        if dry:
            given, rows = {"dim": 64, "n_layers": 1, "n_heads": 4, "ffn_dim": 128}, 1
        config = ModelConfig(vocab_size=512 if dry else 32_000, max_seq_len=tokens, **given)
        found = measure(
            names.split(","), config, OptimConfig(), rows=rows, seq_len=tokens, steps=2 if dry else 8,
            device="cpu" if dry else "cuda", bf16=not dry, compiled=compiled,
        )  # fmt: skip
        figures[shape] = [dataclasses.asdict(step) for step in found]
        name = f"train{'_compiled' * compiled}_{names.split(',')[-1]}.json"
        (out / name).write_text(json.dumps(figures, indent=1) + "\n")
    return {key: {s["name"]: round(s["ratio"], 3) for s in steps} for key, steps in figures.items()}


def train_peer(out: Path, dry: bool, name: str) -> Any:
    """A low-bit training of another library beside the float twin; its kernels want a GPU."""
    if dry or find_spec(name) is None:
        return {"skipped": "on a CPU" if dry else f"{name} is not installed"}
    return train_steps(out, dry, f"float,{name}")


def arena_l(folder: Path, out: Path, dry: bool) -> dict[str, Any]:
    """Quality at 30 M weights: float, the papers' recipe and ours, one seed each (more: ``benchmarks/arena.py``)."""
    rows = ["--rows", "float,plain b1.58,our ternary", "--seeds", "1", "--jobs", "3"]
    options = ["--arena", "l", "--novels", str(folder), *rows, "--out", str(out), *(["--smoke"] if dry else [])]
    command = [sys.executable, "benchmarks/arena.py", *options]
    with tempfile.TemporaryDirectory() as runs:
        done = subprocess.run([*command, "--runs", runs], cwd=ROOT, env=environment(), capture_output=True, text=True)
    (out / "arena.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr[-1500:]
    return {"table": [line for line in done.stdout.splitlines() if line.startswith("|")]}


STEPS: dict[str, Callable[[Path, bool], Any]] = {
    "tests": run_tests,
    "kernels": bench_kernels,
    "decode": decode_whole_model,
    "train": train_steps,
    "profile": profile,
    "torchao": functools.partial(train_peer, name="torchao"),
    "onebitllms": functools.partial(train_peer, name="onebitllms"),
    "tuned": functools.partial(bench_kernels, tune=True),
    # A compiled layer runs torch's operations; the int8 operators are for eager ones.
    "compiled": functools.partial(train_steps, names="float,ternary", compiled=True),
}


def run_step(name: str, step: Callable[[Path, bool], Any], out: Path, dry: bool) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        found = dict(step(out, dry))
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}"[:2000]}
    found["seconds"] = round(time.perf_counter() - start, 1)
    print(f"{name}: {json.dumps(found)[:600]}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--dry_run", action="store_true", help="small shapes on the CPU: does every step run?")
    parser.add_argument("--steps", help="which steps (default: all that are possible)")
    parser.add_argument("--arena", type=Path, help="text of arena L, made by 'arena.py --prepare'")
    parser.add_argument("--report", type=Path, help="JSON of how each step ended (default: gpu.json in --out)")
    parser.add_argument("--limit", type=int, default=65, help="most seconds of a step; arena has four times as long")
    args = parser.parse_args()
    steps = {**STEPS, **({"arena": functools.partial(arena_l, args.arena.resolve())} if args.arena else {})}
    names = args.steps.split(",") if args.steps else list(steps)
    if unknown := [name for name in names if name not in steps]:
        parser.error(f"--steps {unknown[0]}: must be some of {', '.join(steps)} (arena: with --arena)")
    args.out = args.out.resolve()
    file = (args.report or args.out / "gpu.json").resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    import torch

    report: dict[str, Any] = {
        "device": "cpu (dry run)" if args.dry_run else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    for name in names:
        if len(names) == 1:
            report[name] = run_step(name, steps[name], args.out, args.dry_run)
        else:
            part = args.out / f"gpu_{name}.partial"
            limit = args.limit * (4 if name == "arena" else 1)
            command = [sys.executable, __file__, *sys.argv[1:], "--steps", name, "--report", str(part)]
            step = subprocess.Popen(command, env=environment(), start_new_session=True)
            try:
                code = step.wait(limit)
                report[name] = json.loads(part.read_text())[name] if part.exists() else {"failed": f"exit code {code}"}
            except subprocess.TimeoutExpired:
                os.killpg(step.pid, signal.SIGKILL)  # with its own processes, which would disturb the next step
                step.wait()
                report[name] = {"failed": f"took longer than {limit} s"}
            part.unlink(missing_ok=True)
            if "failed" in report[name]:
                print(f"{name}: {report[name]['failed'][:600]}", flush=True)
        file.write_text(json.dumps(report, indent=1) + "\n")
    return int(any("failed" in report[name] for name in names))


if __name__ == "__main__":
    sys.exit(main())
