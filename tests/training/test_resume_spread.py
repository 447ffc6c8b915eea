"""A run of two processes goes on with one, two or four, from one file or from a folder of parts, with the same rows."""

import errno
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet import load_checkpoint
from bitnet.__main__ import main as bitnet
from bitnet.checkpoint import find_checkpoint, read_checkpoint
from bitnet.errors import UserError
from bitnet.training.cli import main as fit
from bitnet.training.run_folder import find_run

from ..conftest import tiny_options
from ..runs import run_python

SAME = (
    "--model.config.dropout=0",
    "--trainer.max_steps=8",
    "--trainer.val_check_interval=8",
    "--trainer.log_every_n_steps=1",
)
STOP = ("--trainer.callbacks+=tests.training.stopping.StopAfter", "--trainer.callbacks.step=4")


def train(arguments: list[str], code: int = 0) -> str:
    done = run_python("train.py", *arguments, code=code)
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
        if sharded and processes == 4:
            falls_back_from_damaged_parts(folder, capsys)
        assert content["state_dict"].keys() == whole["state_dict"].keys()
        for name, tensor in whole["state_dict"].items():
            # Sums in another order; with other rows, or moments of other weights, the difference is in the hundredths.
            torch.testing.assert_close(content["state_dict"][name], tensor, rtol=1e-3, atol=2e-4)
    if sharded:
        assert fit([*tiny_options(stories, half), *SAME, "--ckpt_path=last"]) == 2
        assert "last.ckpt: a folder of parts; only FSDP2 goes on from it" in capsys.readouterr().err
        model, _ = load_checkpoint(half)
        assert torch.equal(
            model.layers[0].attention.wq.weight,
            read_checkpoint(half)["state_dict"]["model.layers.0.attention.wq.weight"],
        )
        assert bitnet(["export", str(half), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
        assert bitnet(["evaluate", str(half), "--data.path", str(stories), "--limit", "2"]) == 0
        assert "bits per byte" in capsys.readouterr().out
        refuses_an_index_that_runs_code(file)


def test_two_processes_that_share_every_matrix_go_on_as_one(stories, tmp_path, whole) -> None:
    """Tensor parallelism by the trainer: both read the same rows; with metrics, validation and checkpoints."""
    folder = tmp_path / "run"
    cut = ["--trainer.strategy.tensor_parallel=2", "--data.batch_size=8"]
    said = train([*options(stories, folder, 2, sharded=True), *cut, *STOP], code=7)
    assert "step 4/8" in said or read_checkpoint(folder)["global_step"] == 4
    train([*options(stories, folder, 1, sharded=True), "--ckpt_path=last"])
    content = read_checkpoint(folder)
    assert content["global_step"] == 8
    for name, tensor in whole["state_dict"].items():
        torch.testing.assert_close(content["state_dict"][name], tensor, rtol=1e-3, atol=2e-4)
    figures = json.loads((folder / "summary.json").read_text())["figures"]
    assert 0 < figures["quant/flip_rate"] < 0.2 and figures["val/loss"] < 6


def test_a_full_disk_is_one_line(stories, tmp_path, capsys, monkeypatch) -> None:
    """The error reaches us in an exception of torch.distributed that is no ``Exception``."""

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", full)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or Lightning gives this process as many as there are cores
    arguments = options(stories, tmp_path / "run", 1, sharded=True)
    capsys.readouterr()
    try:
        assert fit([*arguments, *SAME, "--trainer.max_steps=1"]) == 2
    finally:  # or later runs of this process would be one of several
        torch.distributed.destroy_process_group()
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and "No space left on device" in said[0]
    assert "cannot be written" in said[0] and "none has been saved yet" in said[0]


@pytest.mark.parametrize("late", ["quantize_from=0.5", "quantizer_warmup=3"])
def test_latent_weights_are_not_gathered_as_levels(stories, tmp_path, capsys, late) -> None:
    arguments = [*options(stories, tmp_path / "run", 1, sharded=True), f"--model.recipe.{late}"]
    assert fit([*arguments, "--trainer.strategy.gather=levels"]) == 2
    assert "Set both to 0, or leave gather out." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def falls_back_from_damaged_parts(folder: Path, capsys) -> None:
    """sha256sum agrees with the checksums; a bit in any file, or a file less, and the checkpoint before is taken."""
    last, previous = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "previous.ckpt"
    for checkpoint in (last, previous):
        files = {file.name for file in checkpoint.iterdir()}
        said = subprocess.run("sha256sum -c *.sha256", shell=True, cwd=checkpoint, capture_output=True, text=True)
        assert said.returncode == 0 and {line.partition(":")[0] for line in said.stdout.splitlines()} == {
            name for name in files if not name.endswith(".sha256")
        }
        assert {"meta.pt", ".metadata"} < files and sum(name.endswith(".distcp") for name in files) >= 1
    assert find_run(folder, "last") == (folder, last)
    for file in sorted(last.iterdir()):
        good = file.read_bytes()
        for bad in (good[:50] + bytes([good[50] ^ 4]) + good[51:], good[:-9], None):
            file.unlink() if bad is None else file.write_bytes(bad)
            capsys.readouterr()
            assert find_run(folder, "last") == (folder, previous), file
            assert f"{last} is damaged (" in capsys.readouterr().err
            file.write_bytes(good)
    (last / ".nfs0001").write_bytes(b"left behind by a file system")
    assert find_run(folder, "last") == (folder, last)
    last.rename(folder / "elsewhere")  # as after a stop between the two renames of a save
    assert find_run(folder, "last") == (folder, previous)
    (folder / "elsewhere").rename(last)
    for checkpoint in (last, previous):
        part = checkpoint / "__0_0.distcp"
        part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match="nothing to go on from"):
        find_run(folder, "last")
    with pytest.raises(
        UserError, match=r"last.ckpt: not a readable checkpoint \(the checksum of __0_0.distcp is wrong"
    ):
        read_checkpoint(folder)


def refuses_an_index_that_runs_code(folder: Path) -> None:
    """Whoever writes such an index writes its checksum, too."""
    sums = "sha256sum __0_0.distcp meta.pt .metadata > 0.sha256"
    index = folder / ".metadata"
    good = index.read_bytes()
    # posix.system("true"), as a pickle
    for bad, why in (
        (b"cposix\nsystem\n(S'true'\ntR.", "the index names posix.system"),
        (b"ctorch.distributed.checkpoint.filesystem\nos.system\n(S'true'\ntR.", "the index names .*os.system"),
        (good[:200], "pickle data was truncated"),
    ):
        index.write_bytes(bad)
        subprocess.run(sums, shell=True, cwd=folder, check=True)
        with pytest.raises(UserError, match=rf"not a readable checkpoint \({why}"):
            read_checkpoint(folder)
    index.write_bytes(good)
    subprocess.run(sums, shell=True, cwd=folder, check=True)
    assert read_checkpoint(folder)["global_step"] == 4
