"""Recipes side by side: the same tokens, the same sizes, three seeds, and a float twin that is tuned as hard.

    python benchmarks/arena.py [--arena m] --novels DIR [--rows a,b] [--seeds 3] [--runs DIR] [--test] [--out FOLDER]
    python benchmarks/arena.py --novels DIR --ladder [--rows a,b] [--runs DIR] [--out benchmarks/results]
    python benchmarks/arena.py --novels DIR --trials FILE [--runs DIR] [--out benchmarks/results]   # also of arena L
    python benchmarks/arena.py --novels DIR [--also TEXT ...] --prepare FOLDER       # then, on a GPU:
    python benchmarks/arena.py --arena l --novels FOLDER [--rows a,b] [--seeds 3] [--test] [--out benchmarks/results]

``DIR`` holds the corpus computationalstylistics/100_english_novels, one .txt.xz for each book. Every run trains on
twelve of them by ``bitnet fit`` on one thread, in ``--runs``; finished ones are kept. Then every model is packed,
proven to have the logits it had, and scored as packed on two other books. Choices are made by those; ``--test`` adds
the column of two more that were named before any run: it is for the end. ``--trials`` runs what a YAML file or
a result of former trials lists, with one seed and 600 steps unless it says others, to find what is worth a row.

Arena M is the same text and 30 M weights, three quarters of an hour a run on a core with AMX (``--jobs``: one for
each core).

Arena L is 30 M weights and all books but those four, and other text, tokenized beforehand by ``--prepare`` (42 MB),
for a large GPU. ``--smoke`` makes the table with four steps of a toy, on any machine.
"""

import argparse
import datetime
import json
import lzma
import math
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import yaml
from arena_runs import ARENAS, ROOT, SMOKE, TEST, TRAIN, VALIDATION, books, prepare, train, train_all
from tokenizers import Tokenizer

from bitnet.checkpoint import load_checkpoint
from bitnet.data.corpora import Reading
from bitnet.errors import UserError
from bitnet.evaluation.perplexity import evaluate_text
from bitnet.generation import generate
from bitnet.inference.files import load_packed, save_packed
from bitnet.inference.packing import pack
from bitnet.layers import low_bit_layers
from bitnet.model import Transformer

LADDER = ("float", "our ternary")
"""Rows that are compared at several widths unless ``--rows`` says others."""
WIDTHS: dict[int, dict[str, Any]] = {64: {}, 96: {}, 128: {}, 192: {"model.optim.matrix_lr": 8e-3}}
"""Widths of the ladder, and what changes there: from 192 on both twins want a lower rate (the fifth round)."""


def served(folder: Path) -> tuple[Transformer, Tokenizer]:
    """The packed model (a float one as it is), which must have the logits that were trained."""
    model, tokenizer = load_checkpoint(folder)
    if not low_bit_layers(model):
        return model, tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        save_packed(pack(model), tokenizer, Path(scratch) / "packed.safetensors")
        packed, _ = load_packed(Path(scratch) / "packed.safetensors")
    size = (4, model.config.max_seq_len)
    tokens = torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model(tokens), packed(tokens)), f"{folder}: the packed model has other logits"
    return packed, tokenizer


def score(model: Transformer, tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Nats per token and bits per byte of all ``texts`` together."""
    nats = tokens_read = text_bytes = 0.0
    for text in texts:
        found = evaluate_text(model, tokenizer, text, Reading()).score
        nats, tokens_read, text_bytes = nats + found.nats, tokens_read + found.tokens, text_bytes + found.text_bytes
    return {"nats_per_token": nats / tokens_read, "bits_per_byte": nats / text_bytes / math.log(2)}


def spread(values: list[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def gaps(rows: dict[str, Any]) -> dict[str, list[float]]:
    """Nats per token that each row is behind ``float`` with the same seed."""
    nats = {name: [run["validation"]["nats_per_token"] for run in runs] for name, runs in rows.items()}
    return {name: [a - b for a, b in zip(found, nats.get("float", ()), strict=False)] for name, found in nats.items()}


def table(rows: dict[str, Any], with_test: bool) -> str:
    """Markdown; shares are of the gap of the plain recipe of that kind."""
    behind = gaps(rows)
    head = ["recipe", "nats per token", "bits per byte", "gap to float", "of the plain gap", "tokens/s"]
    head += ["test: bits per byte"] if with_test else []
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    for name, runs in rows.items():
        plain = "plain b1" if "binary" in name or name == "plain b1" else "plain b1.58"
        known = "float" not in name and behind[name] and behind.get(plain)
        share = f"{sum(behind[name]) / sum(behind[plain]):.0%}" if known else "-"
        cells = [name, *(spread([r["validation"][k] for r in runs]) for k in ("nats_per_token", "bits_per_byte"))]
        cells += [
            spread(behind[name]) if behind[name] else "-",
            share,
            f"{statistics.mean(r['tokens_per_s'] for r in runs):,.0f}",
        ]
        cells += [spread([r["test"]["bits_per_byte"] for r in runs])] if with_test else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def trials(file: Path, novels: Path, runs: Path, out: Path | None, arena: str, jobs: int) -> None:
    """Train each of ``runs`` in ``file`` on seed 0 and write them down, in that order, with what they reached.

    A run is its ``options`` on top of the arena's YAML and a ``name``; ``{NAME}`` in a value is the folder of that run.
    ``steps`` of the file are those of each run. With several ``jobs``, no run may begin with the result of another.
    """
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    listed, count = content["runs"], content.get("steps", 600)
    steps = {"trainer.max_steps": count, "trainer.val_check_interval": count, "seed_everything": 0, "data.seed": 0}
    names = [run.get("name", f"{file.stem}_{number}") for number, run in enumerate(listed)]
    folders = {name: runs / name.replace(" ", "_") for name in names}
    all_options = [
        steps | {k: v.format_map(folders) if isinstance(v, str) else v for k, v in run["options"].items()}
        for run in listed
    ]
    done = []
    for run, name, summary in zip(
        listed, names, train_all(all_options, novels, folders.values(), arena, jobs), strict=True
    ):
        figures = summary["figures"]
        reached = {"val_nats_per_token": figures["val/loss"], "val_bits_per_byte": figures["val/bpb"]}
        reached |= {"train_nats_per_token": figures["train/loss"], "seconds": summary["seconds"]}
        done.append({"name": name, "options": run["options"], **reached})
        print(f"{name}: {figures['val/loss']:.4f} nats per token", flush=True)
    for run in sorted(done, key=lambda run: run["val_nats_per_token"]):
        print(f"{run['val_nats_per_token']:8.4f}  {run['name']}")
    if out:
        name = f"arena_{arena}_{file.stem.partition('_cpu_')[0].removeprefix(f'arena_{arena}_')}"
        write(out / name, {"steps": count, "seed": 0, "runs": done})


def write(name: Path, result: dict[str, Any]) -> None:
    """``result`` as JSON with date, commit and torch, in a new file of today."""
    commit = ""  # a copy of the files on a machine without git has figures, too
    if shutil.which("git"):
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = asked.stdout.strip()
    head = {"date": str(datetime.date.today()), "commit": commit, "torch": torch.__version__}
    if torch.cuda.is_available():
        head["device"] = torch.cuda.get_device_name()
    stem = f"{name.name}_{'gpu' if torch.cuda.is_available() else 'cpu'}_{head['date']}"
    file, number = name.with_name(f"{stem}.json"), 1
    while file.exists():
        number += 1
        file = name.with_name(f"{stem}_{number}.json")
    file.write_text(json.dumps(head | result, indent=1) + "\n", encoding="utf-8")


def ladder(names: list[str], novels: Path, runs: Path, out: Path | None) -> None:
    """Rows at four widths, compared as they are stored on the validation books."""
    folders = []
    for name in names:
        for width, changes in WIDTHS.items():
            folder = runs / f"{name.replace(' ', '_')}_{0 if width == 128 else f'dim{width}'}"  # 128 is s.yaml's
            sizes = {
                "model.config.dim": width, "model.config.n_heads": width // 32, "model.config.ffn_dim": 3 * width,
            }  # fmt: skip
            options = {**ARENAS["s"].rows[name], **changes, **sizes}
            train({"seed_everything": 0, "data.seed": 0, **options}, novels, folder, "s")
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


def run_of(args: argparse.Namespace, seed: int, name: str) -> dict[str, Any]:
    """A row with a seed: trained, packed and scored, in a process of its own, since exact products of low-bit layers
    set the precision of all float32 products of a process for a moment."""
    if not ARENAS[args.arena].prepared:
        torch.set_num_threads(1)
    folder = args.runs / f"{name.replace(' ', '_')}_{seed}"
    options = {"seed_everything": seed, "data.seed": seed, **ARENAS[args.arena].rows[name]}
    summary = train(options | (SMOKE if args.smoke else {}), args.novels, folder, args.arena)
    run = {"seed": seed, "options": {k: str(v) for k, v in options.items()}, "seconds": summary["seconds"]}
    run["tokens_per_s"] = summary["figures"]["perf/tokens_per_s"]
    model, tokenizer = served(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    run["validation"] = score(model, tokenizer, books(args.novels, VALIDATION))
    run["test"] = score(model, tokenizer, books(args.novels, TEST)) if args.test else None
    run["sample"] = generate(model, tokenizer, "The ", max_new_tokens=60)
    return run


def compare(args: argparse.Namespace, names: list[str]) -> None:
    """The table: every row with every seed."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    listed = [(seed, name) for seed in range(args.seeds) for name in names]  # a table of fewer seeds is there early
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for (seed, name), run in zip(listed, pool.map(run_of, repeat(args), *zip(*listed, strict=True)), strict=True):
            found[name].append(run)
            print(f"{name}, seed {seed}: {run['validation']['nats_per_token']:.4f} nats per token", flush=True)
            print(f"  {' '.join(run['sample'].split())}", flush=True)
    text = table(found, args.test)
    print(text)
    if args.out:
        given = {"validation": VALIDATION, "test": TEST} | ({} if ARENAS[args.arena].prepared else {"train": TRAIN})
        name = f"arena_{args.arena}{'_smoke' * args.smoke}"
        write(args.out / name, {**given, "rows": found, "table": text.splitlines()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=Path, required=True)
    parser.add_argument("--arena", choices=tuple(ARENAS), default="s")
    parser.add_argument("--rows", help="names with commas between them (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--runs", type=Path, help="folder of the runs (default: runs/arena, runs/arena_m, runs/arena_l)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on one GPU or a core each")
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--ladder", action="store_true", help="four widths, one seed, and 'bitnet compare' over them")
    parser.add_argument("--trials", type=Path, metavar="FILE")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="tokenize the text of arena L, once")
    parser.add_argument("--also", type=Path, nargs="+", default=[], metavar="TEXT", help="with --prepare: more text")
    parser.add_argument("--smoke", action="store_true", help="four steps of a toy: does everything run?")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.runs = args.runs or Path("runs/arena" if args.arena == "s" else f"runs/arena_{args.arena}")
    for name in ("novels", "runs", "out", "prepare"):  # runs are made in another working directory
        if given := getattr(args, name):
            setattr(args, name, given.resolve())
    rows = ARENAS[args.arena].rows
    chosen = args.rows.split(",") if args.rows else list(LADDER if args.ladder else rows)
    if unknown := [name for name in chosen if name not in rows]:
        raise UserError(f"--rows {unknown[0]}: must be some of {', '.join(rows)}.")
    if args.smoke and (args.trials or args.ladder):
        raise UserError("--smoke makes a table: leave out --trials and --ladder.")
    if args.ladder and args.arena != "s":
        raise UserError(f"--arena {args.arena}: the ladder is of arena s.")
    if not ARENAS[args.arena].prepared:
        torch.set_num_threads(1)
    if args.prepare:
        prepare(args.novels, [path.resolve() for path in args.also], args.prepare)
    elif args.trials:
        trials(args.trials, args.novels, args.runs, args.out, args.arena, args.jobs)
    elif args.ladder:
        ladder(chosen, args.novels, args.runs, args.out)
    else:
        compare(args, chosen)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except subprocess.CalledProcessError as error:  # which has said why
        raise SystemExit(error.returncode) from error
