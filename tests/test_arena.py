"""``benchmarks/arena.py``: arena L from a corpus to a table, as a toy, held-out books left out; what arena M trains."""

import json
import lzma
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from benchmarks.arena_runs import ARENAS, text_of
from bitnet.errors import UserError
from bitnet.training.changes import flat
from bitnet.training.cli import plain_config
from tests.conftest import ROOT, story_text

HELD_OUT = ("Doyle_Hound_1902", "Trollope_Warden_1855", "Stevenson_Catriona_1893", "Gissing_Women_1893")
READ = ("Kipling_Captains_1896", "Haggard_She_1887", "Nobody_Known_1900")


def arena(*arguments: str | Path, script: str = "arena.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def book_text(name: str) -> str:
    """Text in which every word tells the book it is from."""
    return re.sub(r"(\w)\b", rf"\1{name[:4]}", story_text(10, seed=len(name)).replace("<|endoftext|>", ""))


@pytest.fixture
def novels(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in (*HELD_OUT, *READ):
        (folder / f"{name}.txt.xz").write_bytes(lzma.compress(book_text(name).encode()))
    return folder


def test_arena_l_from_books_to_a_table(novels: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.txt"
    more.write_text("Some other text. " * 200, encoding="utf-8")
    prepared = tmp_path / "prepared"
    done = arena("--novels", novels, "--also", more, "--prepare", prepared)
    assert done.returncode == 0, done.stderr

    tokenizer = Tokenizer.from_file(str(prepared / "tokens" / "tokenizer.json"))
    texts = {
        file.stem: tokenizer.decode(np.fromfile(file, "<u2").tolist()) for file in (prepared / "tokens").glob("*.bin")
    }
    assert texts.keys() == {"val", *(f"train-{i}" for i in range(len(READ) + 1))}
    read = "".join(text for name, text in texts.items() if name != "val")
    assert all(book_text(name).strip() in read for name in READ)
    assert "Some other text." in read
    for name in HELD_OUT[:2]:
        assert book_text(name).strip() in texts["val"]
    assert not any(name[:4] in read for name in HELD_OUT), "a held-out book is trained on"
    assert not any(name[:4] in texts["val"] for name in HELD_OUT[2:]), "a test book is chosen by"

    options = ("--arena", "l", "--smoke", "--test", "--novels", prepared, "--runs", tmp_path / "runs")
    done = arena(*options, "--rows", "our ternary", "--seeds", "1", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("arena_l_smoke_*.json")
    (run,) = json.loads(file.read_text())["rows"]["our ternary"]
    uniform = math.log(tokenizer.get_vocab_size())  # what four steps can hardly better
    assert 0.5 * uniform < run["validation"]["nats_per_token"] < 1.2 * uniform
    assert run["test"]["bits_per_byte"] > 0 and run["tokens_per_s"] > 0 and run["sample"]
    assert "| our ternary | " in done.stdout


def test_arena_l_wants_a_prepared_folder(novels: Path) -> None:
    with pytest.raises(UserError, match=f"{novels}: no tokens in it; arena L takes a folder that --prepare has made"):
        text_of(novels, "l")


def test_arena_m_is_arena_s_at_the_shape_of_ternary_30m() -> None:
    found, text = (
        flat(plain_config([f"--config={ROOT / 'benchmarks/arena' / name}" for name in ARENAS[arena].files]))
        for arena in ("m", "s")
    )
    preset = flat(yaml.safe_load((ROOT / "configs/ternary_30m.yaml").read_text()))
    sizes = [f"model.config.{name}" for name in ("dim", "n_layers", "n_heads", "ffn_dim")]
    assert {key: found[key] for key in sizes} == {key: preset[key] for key in sizes}
    changed = {key for key in text if found[key] != text[key]}
    assert changed - set(sizes) == {"trainer.precision", "trainer.max_steps", "trainer.val_check_interval"}


def test_the_plot_shows_gaps_between_runs_of_one_seed(tmp_path: Path) -> None:
    nats = {"float": (4.0, 4.5), "plain b1.58": (4.25, 5.25), "our ternary": (4.125, 4.5)}
    rows = {name: [{"validation": {"nats_per_token": found}} for found in of_row] for name, of_row in nats.items()}
    table, out = tmp_path / "arena_s_cpu_2026-01-01.json", tmp_path / "plot.svg"
    table.write_text(json.dumps({"rows": rows}))
    done = arena(table, "--out", out, script="arena_plot.py")
    assert done.returncode == 0, done.stderr
    words = re.findall(r"<!-- (.*?) -->", out.read_text())  # letters are curves in an SVG; their words stand beside
    assert {"Arena S (2 seeds)", "plain b1.58", "our ternary", "0.500", "0.062"} <= set(words)
    assert "float" not in words
