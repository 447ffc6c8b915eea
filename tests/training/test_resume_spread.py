"""A run of two processes goes on with one, two or four, from one file or from a folder of parts, with the same rows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet import load_checkpoint
from bitnet.__main__ import main as bitnet
from bitnet.checkpoint import find_checkpoint, read_checkpoint
from bitnet.errors import UserError
from bitnet.training.run_folder import find_run

from ..conftest import ROOT, tiny_options

SAME = (
    "--model.config.dropout=0",
    "--trainer.max_steps=8",
    "--trainer.val_check_interval=8",
    "--trainer.log_every_n_steps=1",
)
STOP = ("--trainer.callbacks+=tests.training.stopping.StopAfter", "--trainer.callbacks.step=4")


def train(arguments: list[str], code: int = 0) -> str:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def options(text: Path, folder: Path, processes: int, sharded: bool) -> list[str]:
    """A run of ``processes`` that together read eight rows a step."""
    spread = ["--config", "overlays/fsdp", f"--trainer.strategy.sharded_checkpoints={str(sharded).lower()}"]
    rows = [f"--data.batch_size={8 // processes}", f"--trainer.devices={processes}"]
    return [*tiny_options(text, folder), *(spread if processes > 1 or sharded else []), *SAME, *rows]


@pytest.fixture(scope="module")
def whole(stories, tmp_path_factory, run_fit) -> dict[str, Any]:
    """One process, never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_fit(stories, folder, *SAME, "--data.batch_size=8", "--trainer.devices=1")
    return read_checkpoint(folder)


@pytest.mark.parametrize("sharded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_go_on_as_one_and_as_four(stories, tmp_path, whole, sharded, capsys) -> None:
    half = tmp_path / "half"
    train([*options(stories, half, 2, sharded), *STOP], code=7)
    file = find_checkpoint(half)
    assert file.is_dir() == sharded and read_checkpoint(half)["global_step"] == 4
    for processes in (1, 4):
        folder = tmp_path / f"on{processes}"
        shutil.copytree(half, folder)
        train([*options(stories, folder, processes, sharded), "--ckpt_path=last"])
        content = read_checkpoint(folder)
        assert content["global_step"] == 8
        assert content["state_dict"].keys() == whole["state_dict"].keys()
        for name, tensor in whole["state_dict"].items():
            # Sums in another order; with other rows, or moments of other weights, the difference is in the hundredths.
            torch.testing.assert_close(content["state_dict"][name], tensor, rtol=1e-3, atol=2e-4)
    if sharded:
        model, _ = load_checkpoint(half)
        assert torch.equal(
            model.layers[0].attention.wq.weight,
            read_checkpoint(half)["state_dict"]["model.layers.0.attention.wq.weight"],
        )
        assert bitnet(["export", str(half), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
        assert bitnet(["evaluate", str(half), "--data.path", str(stories), "--limit", "2"]) == 0
        assert "bits per byte" in capsys.readouterr().out
        refuses_an_index_that_runs_code(file)


def test_a_folder_of_parts_whose_name_was_being_taken_is_found(tmp_path) -> None:
    """A stop between the two renames of a save leaves only the old folder, under another name."""
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "last.ckpt.old").mkdir(parents=True)
    for name in (".metadata", "meta.pt"):
        (checkpoints / "last.ckpt.old" / name).write_bytes(b"x")
    assert find_run(tmp_path / "run", "last") == (tmp_path / "run", checkpoints / "last.ckpt")
    assert not (checkpoints / "last.ckpt.old").exists()


def refuses_an_index_that_runs_code(folder: Path) -> None:
    index = folder / ".metadata"
    good = index.read_bytes()
    # posix.system("true"), as a pickle
    for bad in (
        b"cposix\nsystem\n(S'true'\ntR.",
        b"ctorch.distributed.checkpoint.filesystem\nos.system\n(S'true'\ntR.",
        good[:200],
    ):
        index.write_bytes(bad)
        with pytest.raises(UserError, match="not a readable checkpoint"):
            read_checkpoint(folder)
    index.write_bytes(good)
    assert read_checkpoint(folder)["global_step"] == 4
