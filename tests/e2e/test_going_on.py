"""Runs that go on under another name, from a file elsewhere, or with what makes another model of them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer

from bitnet.checkpoint import read_checkpoint
from bitnet.training.cli import main as fit

from ..conftest import tiny_options
from ..runs import WINDOW, run_digest

FLOAT = ("--model.recipe.weight=none", "--model.recipe.act_bits=none", "--model.config.dropout=0")
FLOAT += ("--model.config.dim=64", "--model.config.ffn_dim=64")


@pytest.fixture(scope="module")
def float_run(stories: Path, tmp_path_factory: pytest.TempPathFactory, run_fit) -> Path:
    folder = tmp_path_factory.mktemp("float") / "run"
    run_fit(stories, folder, *FLOAT, "--trainer.max_steps=4")
    return folder


def post_training(name: str, parent: Path, text: Path, folder: Path, *options: str) -> list[str]:
    return [
        *("fit", "--config", f"posttrain/{name}", f"--model.init_from={parent}", f"--data.path={text}"),
        *(f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu", "--data.seq_len=32"),
        *("--data.batch_size=4", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2", *options),
    ]


def test_a_checkpoint_beside_a_run_goes_on_in_a_folder_of_its_own(stories, tmp_path, run_fit) -> None:
    root, copy = tmp_path / "run", tmp_path / "copy.ckpt"
    run_fit(stories, root, "--trainer.max_steps=2")
    shutil.copyfile(root / "checkpoints" / "last.ckpt", copy)
    run_fit(stories, root, "--trainer.max_steps=3", "--overwrite", "--seed_everything=5")
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    run_fit(stories, root, "--trainer.max_steps=4", f"--ckpt_path={copy}")
    assert {file: file.read_bytes() for file in root.rglob("*") if file.is_file()} == before
    assert read_checkpoint(tmp_path / "run-2")["global_step"] == 4


@pytest.mark.parametrize("name", ["previous", "best"])
def test_the_last_checkpoint_is_there_when_the_folder_has_another_name(
    stories, tmp_path, run_fit, monkeypatch, name
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--trainer.val_check_interval=3",)
    run_fit(stories, Path("run"), *options, "--trainer.max_steps=3")
    file = tmp_path / "run" / "checkpoints" / f"{name}.ckpt"
    step = read_checkpoint(file)["global_step"] + 1
    run_fit(stories, Path("run"), *options, f"--trainer.max_steps={step}", f"--ckpt_path={file}")
    assert read_checkpoint(tmp_path / "run")["global_step"] == step


def test_a_run_whose_time_is_up_ends_with_a_step(texts, tmp_path, run_fit) -> None:
    """Inside a window of accumulation, what is done since the last step would be lost."""
    whole = ("--trainer.max_steps=6", "--trainer.val_check_interval=9", *WINDOW)
    run_fit(texts, tmp_path / "whole", *whole)
    late = "--trainer.callbacks+=tests.training.stopping.TimeIsUp"
    run_fit(texts, tmp_path / "parts", *whole, late, "--trainer.callbacks.batch=3")
    assert read_checkpoint(tmp_path / "parts")["global_step"] == 2
    run_fit(texts, tmp_path / "parts", *whole, "--ckpt_path=last")
    assert run_digest(tmp_path / "parts") == run_digest(tmp_path / "whole")


def test_a_best_model_of_a_validation_inside_a_window_says_so(texts, tmp_path, run_fit, monkeypatch, capsys) -> None:
    """Windows begin with each epoch, the interval counts on: from the second epoch on, the two do not meet."""
    folder, save = tmp_path / "run" / "checkpoints", Trainer.save_checkpoint

    def watched(self: Any, path: Any, *args: Any, **options: Any) -> None:
        save(self, path, *args, **options)
        shutil.copyfile(path, folder / f"step{self.global_step}-{Path(path).name}")

    monkeypatch.setattr(Trainer, "save_checkpoint", watched)
    options = ("--trainer.limit_train_batches=4", "--trainer.val_check_interval=3", *WINDOW)
    run_fit(texts, tmp_path / "run", *options, "--trainer.max_steps=3")
    for name, warned in (("step1-best", False), ("step2-best", True), ("step2-last", False)):
        assert read_checkpoint(folder / f"{name}.ckpt")["bitnet"]["inside_window"] == warned
        capsys.readouterr()
        run_fit(texts, tmp_path / "run", *options, "--trainer.max_steps=3", f"--ckpt_path={folder / name}.ckpt")
        assert ("was saved inside a window of accumulation" in capsys.readouterr().err) == warned


def test_a_checkpoint_named_from_within_its_folder_is_of_that_run(stories, tmp_path, run_fit, monkeypatch) -> None:
    run_fit(stories, tmp_path / "run", "--trainer.max_steps=1")
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    run_fit(stories, tmp_path / "run", "--trainer.max_steps=2", "--ckpt_path=last.ckpt")
    assert read_checkpoint(tmp_path / "run")["global_step"] == 2
    assert [folder.name for folder in tmp_path.iterdir()] == ["run"]


def test_bits_of_a_grid_of_each_step_may_change(float_run, stories, tmp_path, capsys) -> None:
    options = post_training("llm_qat", float_run, stories, tmp_path / "run")
    assert fit([*options, "--trainer.max_steps=1"]) == 0
    fewer = "--model.recipe.init_args.bits=3"
    assert fit([*options, "--trainer.max_steps=2", fewer, "--ckpt_path=last"]) == 0
    assert "bits = 3, but 4 when the checkpoint was saved" in capsys.readouterr().err


def test_another_teacher_is_named(float_run, stories, tmp_path, run_fit, capsys) -> None:
    other = tmp_path / "other"
    run_fit(stories, other, *FLOAT, "--trainer.max_steps=5")
    options = post_training("llm_qat", float_run, stories, tmp_path / "run")
    assert fit([*options, "--trainer.max_steps=2"]) == 0
    capsys.readouterr()
    assert fit([*options, "--trainer.max_steps=2", "--ckpt_path=last"]) == 0
    assert "teacher" not in capsys.readouterr().err
    options = [option.replace(str(float_run), str(other)) for option in options]
    assert fit([*options, "--trainer.max_steps=3", "--ckpt_path=last"]) == 0
    assert "warning: teacher = " in capsys.readouterr().err


@pytest.mark.parametrize(
    "name,option",
    [
        ("peqa", "bits=2"),
        ("peqa", "symmetric=true"),
        ("qlora", "quantizer=uniform"),
        ("qat", "act_scale=static"),
    ],
)
def test_another_grid_is_another_model(float_run, stories, tmp_path, capsys, name, option) -> None:
    options = post_training(name, float_run, stories, tmp_path / "run", "--trainer.max_steps=1")
    assert fit(options) == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    assert fit([*options, f"--model.recipe.init_args.{option}", "--ckpt_path=last"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        option.replace("true", "True").replace("=", " = ") in error and "begin a new run from the float model" in error
    )
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_folder_of_home_or_of_here(stories, tmp_path, run_fit, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    run_fit(stories, Path("~/runs/x"), "--trainer.max_steps=1")
    assert (tmp_path / "home/runs/x/checkpoints/last.ckpt").is_file()
    assert (tmp_path / "home/runs/x/summary.json").is_file() and list(here.iterdir()) == []
    (here / "notes.txt").write_text("mine")
    run_fit(stories, Path("."), "--trainer.max_steps=1")
    assert (tmp_path / "here-2" / "summary.json").is_file()
    assert fit([*tiny_options(stories, here), "--trainer.default_root_dir=null", "--trainer.max_steps=1"]) == 0
    assert (here / "runs/run/checkpoints/last.ckpt").is_file()
