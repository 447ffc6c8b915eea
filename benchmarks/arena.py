"""Recipes side by side: the same tokens, the same sizes, three seeds, and a float twin that is tuned as hard.

    python benchmarks/arena.py --novels DIR [--rows a,b] [--seeds 3] [--runs DIR] [--test] [--out benchmarks/results]
    python benchmarks/arena.py --novels DIR --ladder [--rows a,b] [--runs DIR] [--out benchmarks/results]
    python benchmarks/arena.py --novels DIR --trials FILE [--runs DIR] [--out benchmarks/results]

``DIR`` holds the corpus computationalstylistics/100_english_novels, one .txt.xz for each book. Every run trains on
twelve of them by ``bitnet fit`` on one thread, in ``--runs``; finished ones are kept. Then every model is packed,
proven to have the logits it had, and scored as packed on two other books. Choices are made by those; ``--test`` adds
the column of two more that were named before any run: it is for the end. ``--trials`` runs what a YAML file or
a result of former trials lists: one seed, half as long, to find what is worth a row.
"""

import argparse
import datetime
import json
import lzma
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from bitnet.checkpoint import load_checkpoint
from bitnet.data.corpora import Reading
from bitnet.errors import UserError
from bitnet.evaluation.perplexity import evaluate_text
from bitnet.inference.files import load_packed, save_packed
from bitnet.inference.packing import pack
from bitnet.layers import low_bit_layers
from bitnet.training.changes import flat
from bitnet.training.cli import plain_config

ROOT = Path(__file__).parents[1]
TRAIN = (
    "Burnett_Lord_1886", "Burnett_Princess_1905", "Stevenson_Treasure_1883", "Stevenson_Arrow_1888",
    "Kipling_Captains_1896", "Doyle_Lost_1912", "Haggard_Mines_1885", "Chesterton_Innocence_1911",
    "Chesterton_Thursday_1908", "Doyle_Micah_1889", "Haggard_She_1887", "Braddon_Audley_1862",
)  # fmt: skip
VALIDATION = ("Doyle_Hound_1902", "Trollope_Warden_1855")
TEST = ("Stevenson_Catriona_1893", "Gissing_Women_1893")

FLOAT = {"model.recipe.weight": "none", "model.recipe.act_bits": "none", "model.schedule.weight_decay_until": 1.0}
ADAMW = {"model.config.init_std": 0.09}  # dim ** -0.5; Muon does better with 0.02 (docs/recipes/pretraining.md)
PLAIN = {  # Microsoft's training tips; rate and initial deviation are the best of seven (600 steps)
    **ADAMW,
    "model.schedule.kind": "two_stage", "model.schedule.weight_decay_until": 0.5, "model.optim.weight_decay": 0.1,
    "model.optim.betas": "[0.9, 0.95]", "model.optim.lr": 8e-3,
}  # fmt: skip
MUON = {
    "model.optim.kind": "muon", "model.optim.lr": 1.6e-2,
    "model.schedule.kind": "wsd", "model.schedule.decay_fraction": 0.5,
}  # fmt: skip
BINARY = {"model.recipe.weight": "binary"}
LATE = {"model.recipe.quantize_from": 0.4, "model.recipe.quantizer_warmup": 240}  # blended in up to 60 %

ROWS: dict[str, dict[str, Any]] = {
    "float": {**FLOAT, **MUON},
    "plain b1.58": PLAIN,
    "our ternary": {**MUON, **LATE},
    "plain b1": {**PLAIN, **BINARY},
    "our binary": {**MUON, **LATE, **BINARY},
    "float with AdamW": {**FLOAT, **ADAMW, "model.optim.lr": 4e-3},
    "ternary from the start": MUON,
}
"""Options of ``bitnet fit`` on top of s.yaml, by the name of the row."""

LADDER = ("float", "our ternary")
"""Rows that are compared at several widths unless ``--rows`` says others."""
WIDTHS: dict[int, dict[str, Any]] = {64: {}, 96: {}, 128: {}, 192: {"model.optim.matrix_lr": 8e-3}}
"""Widths of the ladder, and what changes there: from 192 on both twins want a lower rate (the fifth round)."""


def books(folder: Path, names: tuple[str, ...]) -> list[str]:
    missing = [name for name in names if not (folder / f"{name}.txt.xz").is_file()]
    if missing:
        raise SystemExit(f"skipped: {folder} has no {missing[0]}.txt.xz; --novels takes a folder of 100_english_novels")
    return [str(folder / f"{name}.txt.xz") for name in names]


def check_options(folder: Path, options: list[str]) -> None:
    """Refuse to take a run for one with ``options`` that was trained with others, s.yaml's and defaults included."""
    found = flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    for key, value in flat(plain_config(options)).items():
        if key in found and found[key] != value:
            raise UserError(f"{folder}: was trained with {key} = {found[key]}, not {value}; give another --runs.")


def train(options: dict[str, Any], novels: Path, folder: Path) -> dict[str, Any]:
    """The summary of a run; one that is finished is not run again, one that was stopped goes on."""
    summary = folder / "summary.json"
    given = {
        "data.path": json.dumps(books(novels, TRAIN)),
        "data.val_path": json.dumps(books(novels, VALIDATION)),
        "trainer.default_root_dir": folder,
        **options,
    }
    arguments = ["--config", str(ROOT / "benchmarks/arena/s.yaml"), *(f"--{key}={v}" for key, v in given.items())]
    if (folder / "config.yaml").is_file():
        check_options(folder, arguments)
    if not summary.is_file():
        command = [sys.executable, "train.py", "fit", *arguments]
        if (folder / "checkpoints" / "last.ckpt").is_file():
            command.append("--ckpt_path=last")
        elif folder.exists():
            command.append("--overwrite")  # stopped before its first checkpoint
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return dict(json.loads(summary.read_text(encoding="utf-8")))


@torch.inference_mode()
def score(folder: Path, novels: Path, names: tuple[str, ...]) -> dict[str, float]:
    """Nats per token and bits per byte of the packed model (a float one as it is), which must equal the trained one."""
    model, tokenizer = load_checkpoint(folder)
    if low_bit_layers(model):
        with tempfile.TemporaryDirectory() as scratch:
            save_packed(pack(model), tokenizer, Path(scratch) / "packed.safetensors")
            packed, _ = load_packed(Path(scratch) / "packed.safetensors")
        tokens = torch.randint(model.config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
        assert torch.equal(model(tokens), packed(tokens)), f"{folder}: the packed model has other logits"
        model = packed
    nats = tokens_read = text_bytes = 0.0
    for book in books(novels, names):
        found = evaluate_text(model, tokenizer, book, Reading()).score
        nats, tokens_read, text_bytes = nats + found.nats, tokens_read + found.tokens, text_bytes + found.text_bytes
    return {"nats_per_token": nats / tokens_read, "bits_per_byte": nats / text_bytes / 0.6931471805599453}


def spread(values: list[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def table(rows: dict[str, Any], with_test: bool) -> str:
    """Markdown; gaps are to ``float`` with the same seed, shares are of the gap of the plain recipe of that kind."""
    nats = {name: [run["validation"]["nats_per_token"] for run in runs] for name, runs in rows.items()}
    gaps = {name: [a - b for a, b in zip(found, nats.get("float", ()), strict=False)] for name, found in nats.items()}
    head = ["recipe", "nats per token", "bits per byte", "gap to float", "of the plain gap", "tokens/s"]
    head += ["test: bits per byte"] if with_test else []
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    for name, runs in rows.items():
        plain = "plain b1" if "binary" in name or name == "plain b1" else "plain b1.58"
        known = "float" not in name and gaps[name] and gaps.get(plain)
        share = f"{sum(gaps[name]) / sum(gaps[plain]):.0%}" if known else "-"
        cells = [name, *(spread([r["validation"][k] for r in runs]) for k in ("nats_per_token", "bits_per_byte"))]
        cells += [
            spread(gaps[name]) if gaps[name] else "-",
            share,
            f"{statistics.mean(r['tokens_per_s'] for r in runs):,.0f}",
        ]
        cells += [spread([r["test"]["bits_per_byte"] for r in runs])] if with_test else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def trials(file: Path, novels: Path, runs: Path, out: Path | None) -> None:
    """Train each of ``runs`` in ``file`` on seed 0 and write them down, in that order, with what they reached.

    A run is its ``options`` on top of s.yaml and a ``name``; ``{NAME}`` in a value is the folder of that run.
    """
    listed = yaml.safe_load(file.read_text(encoding="utf-8"))["runs"]
    steps = {"trainer.max_steps": 600, "trainer.val_check_interval": 600, "seed_everything": 0, "data.seed": 0}
    folders, done = {}, []
    for number, run in enumerate(listed):
        name = run.get("name", f"{file.stem}_{number}")
        folders[name] = runs / name.replace(" ", "_")
        options = {k: v.format_map(folders) if isinstance(v, str) else v for k, v in run["options"].items()}
        summary = train({**steps, **options}, novels, folders[name])
        figures = summary["figures"]
        reached = {"val_nats_per_token": figures["val/loss"], "val_bits_per_byte": figures["val/bpb"]}
        reached |= {"train_nats_per_token": figures["train/loss"], "seconds": summary["seconds"]}
        done.append({"name": name, "options": run["options"], **reached})
        print(f"{name}: {figures['val/loss']:.4f} nats per token", flush=True)
    for run in sorted(done, key=lambda run: run["val_nats_per_token"]):
        print(f"{run['val_nats_per_token']:8.4f}  {run['name']}")
    if out:
        write(out / f"arena_s_{file.stem.partition('_cpu_')[0].removeprefix('arena_s_')}", {"steps": 600, "runs": done})


def write(name: Path, result: dict[str, Any]) -> None:
    """``result`` as JSON with date, commit and torch, in a new file of today."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    head = {"date": str(datetime.date.today()), "commit": commit.stdout.strip(), "torch": torch.__version__}
    file, number = name.with_name(f"{name.name}_cpu_{head['date']}.json"), 1
    while file.exists():
        number += 1
        file = name.with_name(f"{name.name}_cpu_{head['date']}_{number}.json")
    file.write_text(json.dumps(head | result, indent=1) + "\n", encoding="utf-8")


def ladder(names: list[str], novels: Path, runs: Path, out: Path | None) -> None:
    """Rows at four widths, compared as they are stored on the validation books."""
    folders = []
    for name in names:
        for width, changes in WIDTHS.items():
            folder = runs / f"{name.replace(' ', '_')}_{0 if width == 128 else f'dim{width}'}"  # 128 is s.yaml's
            sizes = {"dim": width, "n_heads": width // 32, "ffn_dim": 3 * width}
            options = {**ROWS[name], **changes, **{f"model.config.{key}": value for key, value in sizes.items()}}
            train({"seed_everything": 0, "data.seed": 0, **options}, novels, folder)
            folders.append(str(folder))
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "validation.txt"
        parts = [lzma.decompress(Path(book).read_bytes()).decode("utf-8-sig") for book in books(novels, VALIDATION)]
        text.write_text("\n".join(parts), encoding="utf-8")
        report = Path(scratch) / "report"
        command = [sys.executable, "-m", "bitnet", "compare", *folders, "--data.path", str(text), "--threads", "1"]
        subprocess.run([*command, "--out", str(report)], cwd=ROOT, check=True)
        if out:
            result = json.loads((report / "comparison.json").read_text(encoding="utf-8"))
            write(out / "ladder_s", result | {"text": text.name})
            shutil.copyfile(report / "ladder.svg", ROOT / "docs/images/ladder_s.svg")
        print((report / "report.md").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=Path, required=True)
    parser.add_argument("--rows", help="names with commas between them (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/arena"))
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--ladder", action="store_true", help="four widths, one seed, and 'bitnet compare' over them")
    parser.add_argument("--trials", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name in ("novels", "runs", "out"):  # runs are made in another working directory
        if given := getattr(args, name):
            setattr(args, name, given.resolve())
    torch.set_num_threads(1)
    if args.trials:
        trials(args.trials, args.novels, args.runs, args.out)
        return
    chosen = args.rows.split(",") if args.rows else list(LADDER if args.ladder else ROWS)
    if args.ladder:
        ladder(chosen, args.novels, args.runs, args.out)
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for seed in range(args.seeds):  # the seeds outside, so that a table of fewer is there early
        for name in chosen:
            folder = args.runs / f"{name.replace(' ', '_')}_{seed}"
            options = {"seed_everything": seed, "data.seed": seed, **ROWS[name]}
            summary = train(options, args.novels, folder)
            run = {"seed": seed, "options": {k: str(v) for k, v in options.items()}, "seconds": summary["seconds"]}
            run["tokens_per_s"] = summary["figures"]["perf/tokens_per_s"]
            run["validation"] = score(folder, args.novels, VALIDATION)
            run["test"] = score(folder, args.novels, TEST) if args.test else None
            found[name].append(run)
            print(f"{name}, seed {seed}: {run['validation']['nats_per_token']:.4f} nats per token", flush=True)
    text = table(found, args.test)
    print(text)
    if args.out:
        given = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
        write(args.out / "arena_s", {**given, "rows": found, "table": text.splitlines()})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
