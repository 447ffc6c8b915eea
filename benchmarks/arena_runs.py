"""What ``benchmarks/arena.py`` trains: the books, the options of each row, and runs of ``bitnet fit`` that are kept."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bitnet.errors import UserError
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


@dataclass(frozen=True, kw_only=True)
class Arena:
    """Rates and the start of an arena; sizes, tokens and the rest stand in files of ``benchmarks/arena``."""

    files: tuple[str, ...]
    """Of ``benchmarks/arena``, the later ones on top."""
    prepared: bool = False
    """It reads tokens that ``prepare`` has made, for a GPU; others read the books, one thread a run."""
    muon_rate: float
    adamw_rate: float
    """Of the plain low-bit recipes."""
    adamw_float_rate: float
    init_std: float
    """For AdamW, ``dim ** -0.5``; Muon does better with 0.02 (docs/recipes/pretraining.md)."""

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Options of ``bitnet fit`` on top of the YAML file, by the name of the row."""
        to_float = {
            "model.recipe.weight": "none", "model.recipe.act_bits": "none", "model.schedule.weight_decay_until": 1.0,
        }  # fmt: skip
        muon = {
            "model.optim.kind": "muon", "model.optim.lr": self.muon_rate,
            "model.schedule.kind": "wsd", "model.schedule.decay_fraction": 0.5,
        }  # fmt: skip
        ours = {**muon, "model.recipe.quantize_from": 0.4, "model.recipe.quantizer_warmup": 0.2}
        adamw = {"model.config.init_std": self.init_std}
        plain = {  # Microsoft's training tips
            **adamw,
            "model.schedule.kind": "two_stage", "model.schedule.weight_decay_until": 0.5,
            "model.optim.weight_decay": 0.1, "model.optim.betas": "[0.9, 0.95]", "model.optim.lr": self.adamw_rate,
        }  # fmt: skip
        binary = {"model.recipe.weight": "binary"}
        return {
            "float": {**to_float, **muon},
            "plain b1.58": plain,
            "our ternary": ours,
            "plain b1": {**plain, **binary},
            "our binary": {**ours, **binary},
            "float with AdamW": {**to_float, **adamw, "model.optim.lr": self.adamw_float_rate},
            "ternary from the start": muon,
        }


ARENAS = {
    # plain: rate and initial deviation are the best of seven (600 steps)
    "s": Arena(files=("s.yaml",), muon_rate=1.6e-2, adamw_rate=8e-3, adamw_float_rate=4e-3, init_std=0.09),
    # Muon's is the best of three for both twins, plain's the best of four
    "m": Arena(files=("s.yaml", "m.yaml"), muon_rate=2.4e-3, adamw_rate=1.2e-3, adamw_float_rate=1.2e-3, init_std=0.04),
    # the rate of ternary_30m; under AdamW the better of two, and that of QuEST's 30M row
    "l": Arena(
        files=("l.yaml",), prepared=True, muon_rate=2.4e-3, adamw_rate=2.4e-3, adamw_float_rate=1.2e-3, init_std=0.04
    ),
}
SMOKE = {
    "model.config.dim": 64, "model.config.n_layers": 2, "model.config.n_heads": 2, "model.config.ffn_dim": 128,
    "data.seq_len": 32, "data.batch_size": 2, "trainer.max_steps": 4, "trainer.val_check_interval": 4,
    "trainer.accelerator": "cpu", "trainer.precision": "32-true", "model.schedule.warmup_steps": 1,
}  # fmt: skip
"""Options under which a run of any arena takes seconds, and means nothing."""


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


def text_of(novels: Path, arena: str) -> dict[str, str]:
    """What a run reads: twelve books and two, or tokens that were prepared from all of them."""
    if not ARENAS[arena].prepared:
        return {"data.path": json.dumps(books(novels, TRAIN)), "data.val_path": json.dumps(books(novels, VALIDATION))}
    if not (novels / "tokens").is_dir():
        raise UserError(f"{novels}: no tokens in it; arena {arena.upper()} takes a folder that --prepare has made.")
    return {"data.path": str(novels / "tokens")}


def prepare(novels: Path, also: list[Path], folder: Path) -> None:
    """Make ``folder`` with tokens of all books but those held out (and of ``also``), and with the books held out."""
    held_out = books(novels, VALIDATION + TEST)
    rest = sorted(str(book) for book in novels.glob("*.txt.xz") if str(book) not in held_out)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"--data.path={text}" for text in (*rest, *also)]
    texts += [f"--data.val_path={book}" for book in books(novels, VALIDATION)]
    command = [sys.executable, "-m", "bitnet", "prepare", *texts, "--data.vocab_size=8192", f"--out={folder}/tokens"]
    subprocess.run(command, cwd=ROOT, check=True)
    for book in held_out:
        shutil.copy(book, folder)


def train(options: dict[str, Any], novels: Path, folder: Path, arena: str) -> dict[str, Any]:
    """The summary of a run; one that is finished is not run again, one that was stopped goes on."""
    summary = folder / "summary.json"
    given = {**text_of(novels, arena), "trainer.default_root_dir": folder, **options}
    files = [f"--config={ROOT / 'benchmarks/arena' / name}" for name in ARENAS[arena].files]
    arguments = [*files, *(f"--{key}={v}" for key, v in given.items())]
    if (folder / "config.yaml").is_file():
        check_options(folder, arguments)
    if not summary.is_file():
        command = [sys.executable, "train.py", "fit", *arguments]
        if (folder / "checkpoints" / "last.ckpt").is_file():
            command.append("--ckpt_path=last")
        elif folder.exists():
            command.append("--overwrite")  # stopped before its first checkpoint
        one_thread = {} if ARENAS[arena].prepared else {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env={**os.environ, **one_thread}, check=True)
    return dict(json.loads(summary.read_text(encoding="utf-8")))


def train_all(
    options: list[dict[str, Any]], novels: Path, folders: Iterable[Path], arena: str, jobs: int
) -> Iterable[dict[str, Any]]:
    """The summaries of runs, in their order; ``jobs`` of them train at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda given, folder: train(given, novels, folder, arena), options, folders)
