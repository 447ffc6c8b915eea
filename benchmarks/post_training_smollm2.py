"""Post-training methods on a real model with real outliers: SmolLM2-135M, perplexity of WikiText, seconds and memory.

    bitnet import SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm2
    python benchmarks/post_training_smollm2.py runs/smollm2 --text wikitext_valid.txt --calibration wiki.txt --json FILE

Every row is ``bitnet quantize`` and ``bitnet evaluate`` in processes of their own. If the parent was dequantized from
4 bits in groups of 32, as here, rows of 4 bits prove nothing: part of their grid is the one the weights are on already.
"""

import argparse
import datetime
import json
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BITNET = [sys.executable, "-m", "bitnet"]
SEARCHED = "SmoothQuant O2"
"""The row that searches alpha; the others of SmoothQuant take what it has found."""
ROWS: dict[str, list[str]] = {
    "W8A8 per tensor, O1": ["smoothquant", "--alpha", "none", "--level", "o1"],
    "W8A8 per tensor, O2": ["smoothquant", "--alpha", "none", "--level", "o2"],
    "W8A8 per tensor, O3": ["smoothquant", "--alpha", "none", "--level", "o3"],
    SEARCHED: ["smoothquant", "--alpha", "auto", "--level", "o2"],
    "SmoothQuant O1": ["smoothquant", "--alpha", "FOUND", "--level", "o1"],
    "SmoothQuant O3": ["smoothquant", "--alpha", "FOUND", "--level", "o3"],
    "SmoothQuant O2, w2 too": ["smoothquant", "--alpha", "FOUND", "--level", "o2", "--matrices", "true"],
    "SmoothQuant O3, w2 too": ["smoothquant", "--alpha", "FOUND", "--level", "o3", "--matrices", "true"],
    "SmoothQuant, channel and token": ["smoothquant", "--alpha", "FOUND", "--weight_scale", "channel"],
    "LLM.int8()": ["llm_int8"],
    **{
        f"{label} {bits} bits, groups of 64": [recipe, "--bits", str(bits), "--group_size", "64"]
        for bits in (4, 3, 2)
        for label, recipe in (("RTN", "rtn"), ("AWQ", "awq"), ("GPTQ", "gptq"))
    },
    "SpQR 3 bits": ["spqr", "--bits", "3"],
    **{
        f"EfficientQAT {bits} bits, groups of 64 (Block-AP)": [
            "efficient_qat", "--bits", str(bits), "--group_size", "64", "--block_steps", "16", "--block_lr", "2e-4",
            "--block_grid_lr", "1e-3", "--batch_size", "2",
        ]
        for bits in (2, 3, 4)
    },
    "EfficientQAT 2 bits, 64 steps a block": [
        "efficient_qat", "--bits", "2", "--group_size", "64", "--block_steps", "64", "--block_lr", "3e-4",
        "--block_grid_lr", "1e-3", "--batch_size", "2",
    ],
}  # fmt: skip
WITHOUT_TEXT = ("rtn", "llm_int8")


def run(command: list[str]) -> str:
    return subprocess.run([*BITNET, *command], check=True, stdout=subprocess.PIPE, text=True).stdout


def evaluate(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    options = ["--seq_len", str(args.seq_len), "--limit", str(args.windows), "--batch_size", "1"]
    found: dict[str, Any] = json.loads(run(
        ["evaluate", str(path), "--data.path", args.text, *options, "--threads", str(args.threads), "--json"]
    ))  # fmt: skip
    return found


def measure(name: str, options: list[str], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Quantize, evaluate, and throw the model away."""
    recipe, out = options[0], folder / "model"
    text = [] if recipe in WITHOUT_TEXT else [
        "--calibration", args.calibration, "--calibration_rows", str(args.rows), "--calibration_len", "512",
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["quantize", str(args.model), "--recipe", *options, "--out", str(out), "--threads", str(args.threads)]
    run([*command, *text])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    origin = json.loads((out / "origin.json").read_text())
    score = evaluate(out, args)
    shutil.rmtree(out)
    return {
        "perplexity": score["perplexity"],
        "loss": score["loss"],
        "cpu_seconds": round(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, 1),
        "method_seconds": origin["seconds"],
        "peak_memory_mb": origin["peak_memory_mb"],
        **{key: origin[key] for key in ("alpha", "block_errors") if key in origin},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--rows", type=int, default=32, help="calibration rows of 512 tokens")
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    file = Path(args.json)
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    settings = {
        "threads": args.threads, "text": Path(args.text).name, "windows": args.windows, "seq_len": args.seq_len,
        "calibration_rows": args.rows,
    }  # fmt: skip
    before = results.get("about", {})
    if changed := {key: before[key] for key in settings if before and before[key] != settings[key]}:
        parser.error(f"{file}: its rows were measured with {changed}; give another --json")
    results["about"] = {"date": str(datetime.date.today()), "python": platform.python_version(), **settings}
    rows = results["rows"]
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        if "float" not in rows:
            rows["float"] = evaluate(args.model, args)
            print(f"float: {rows['float']['perplexity']:.3f}", flush=True)
        for name, options in ROWS.items():
            if name in rows or args.only not in name:
                continue
            options = [str(rows[SEARCHED]["alpha"]) if option == "FOUND" else option for option in options]
            rows[name] = measure(name, options, args, Path(folder))
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            row = rows[name]
            print(
                f"{name:48} {row['perplexity']:12.3f} {row['cpu_seconds']:8.0f} s {row['peak_memory_mb']:6} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
