"""Run folders: numbered, replaced when that is asked for and nothing is lost, found again; and what a run refuses."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from bitnet.checkpoint import read_checkpoint
from bitnet.training.cli import main as fit
from bitnet.training.run_folder import find_run, is_first_process, new_run_folder, run_family, set_aside, settle

from .conftest import tiny_options


def test_a_new_run_never_overwrites_an_old_one(tmp_path, stories, run_fit) -> None:
    root = tmp_path / "run"
    for expected in ("run", "run-2", "run-3"):
        run_fit(stories, root, "--trainer.max_steps=2")
        assert (tmp_path / expected / "checkpoints" / "last.ckpt").is_file()
    first = (root / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    run_fit(stories, root, "--trainer.max_steps=3", "--ckpt_path=last")
    assert (root / "checkpoints" / "last.ckpt").stat().st_mtime_ns == first
    saved = yaml.safe_load((tmp_path / "run-3" / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 3 and saved["trainer"]["default_root_dir"].endswith("run-3")
    run_fit(stories, root, "--trainer.max_steps=2", "--overwrite")
    assert (root / "checkpoints" / "last.ckpt").stat().st_mtime_ns != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run-2", "run-3"]


def test_a_run_that_fails_before_it_has_saved_replaces_nothing(tmp_path, stories, run_fit, capsys) -> None:
    root = tmp_path / "run"
    run_fit(stories, root, "--trainer.max_steps=2")
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    for wrong, said in (
        ("--trainer.limit_val_batches=0.01", "trainer: You requested to check 0.01"),  # not before the loaders are made
        (f"--model.init_from={root}", f"--overwrite: model.init_from = {root} is of the run that would be replaced"),
        (f"--model.init_from={root / 'checkpoints/best.ckpt'}", "is of the run that would be replaced"),
    ):
        assert fit([*tiny_options(stories, root), "--trainer.max_steps=2", "--overwrite", wrong]) == 2
        assert said in capsys.readouterr().err
        assert {file: file.read_bytes() for file in root.rglob("*") if file.is_file()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_replacement_that_was_killed_leaves_both_or_the_one_that_was_trained(tmp_path) -> None:
    """``set_aside`` finds what an earlier one has left."""
    for new_has_saved in (False, True):
        root = tmp_path / f"run{new_has_saved}"
        for run in ("old", "new"):
            (root / "checkpoints").mkdir(parents=True)
            if run == "old" or new_has_saved:
                (root / "checkpoints" / "last.ckpt").write_text(run)
            aside = set_aside(root)
        assert not root.exists()
        assert (aside / "checkpoints" / "last.ckpt").read_text() == ("new" if new_has_saved else "old")
        settle(aside, root, failed=True)
        assert (root / "checkpoints" / "last.ckpt").exists() and not aside.exists()


def test_progress_and_checkpoints_may_be_left_out(tmp_path, stories, run_fit) -> None:
    steps = "--trainer.max_steps=2"
    run_fit(stories, tmp_path / "run", steps, "--trainer.enable_progress_bar=false")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    run_fit(stories, tmp_path / "other", steps, "--trainer.enable_checkpointing=false")
    assert not (tmp_path / "other" / "checkpoints").exists() and (tmp_path / "other" / "summary.json").exists()


def test_overwrite_spares_folders_that_are_no_runs(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not the folder of a run"):
        new_run_folder(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_run_that_began_in_the_meantime_is_not_deleted(stories, tmp_path, monkeypatch, capsys) -> None:
    """Two runs that start together may have chosen the same folder."""
    folder = tmp_path / "run"

    def chosen(root: Path, overwrite: bool) -> Path:
        folder.mkdir()
        (folder / "config.yaml").write_text("of the other one")
        return root

    monkeypatch.setattr("bitnet.training.fit_cli.new_run_folder", chosen)
    assert fit([*tiny_options(stories, folder), "--trainer.max_steps=1"]) == 2
    assert "another run has begun there in the meantime" in capsys.readouterr().err
    assert [file.name for file in folder.iterdir()] == ["config.yaml"]


TEN_MINUTES = ("--trainer.val_check_interval=00:00:10:00",)
HALVES = ("--trainer.val_check_interval=0.5", "--trainer.check_val_every_n_epoch=1")


@pytest.mark.parametrize(
    "options,said",
    [
        (["--trainer.max_steps=-1", "--trainer.max_time=00:00:01:00"], "the schedule must know where the run ends"),
        (
            ["--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=6"],
            "trainer.val_check_interval = 6: counts batches, and must be a multiple of "
            "trainer.accumulate_grad_batches = 4; try 4.",
        ),
        *(
            (
                ["--trainer.accumulate_grad_batches=4", *options],
                f"trainer.val_check_interval = {every}: with trainer.accumulate_grad_batches = 4 it must be a "
                "number of batches, and a multiple of 4.",
            )
            for every, options in (("0.5", HALVES), ("a duration", TEN_MINUTES))
        ),
    ],
)
def test_runs_without_end_and_validation_inside_a_window_are_refused(stories, tmp_path, capsys, options, said) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("of an old run")
    assert fit([*tiny_options(stories, tmp_path / "run"), *options, "--overwrite"]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == "of an old run"


def test_an_interval_beyond_the_end_means_never(stories, tmp_path) -> None:
    options = ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=10000", "--trainer.max_steps=1"]
    assert fit([*tiny_options(stories, tmp_path / "run"), *options]) == 0


@pytest.mark.parametrize("options", [TEN_MINUTES, HALVES])
def test_validation_by_the_clock_and_by_parts_of_an_epoch(stories, tmp_path, options) -> None:
    assert fit([*tiny_options(stories, tmp_path / "run"), *options, "--trainer.max_steps=20"]) == 0
    assert "val/loss" in json.loads((tmp_path / "run" / "summary.json").read_text())["figures"]


def test_one_callback_need_not_be_a_list(stories, tmp_path) -> None:
    one = '--trainer.callbacks={"class_path":"bitnet.training.callbacks.LastCheckpoint"}'
    assert fit([*tiny_options(stories, tmp_path / "run"), one, "--trainer.max_steps=1"]) == 0


@pytest.mark.parametrize(
    "environment,first",
    [({}, True), ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, False), ({"RANK": "0", "LOCAL_RANK": "1"}, True)],
)
def test_the_first_process_is_who_the_launcher_says(monkeypatch, environment, first) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first


def test_last_is_the_newest_of_the_family_and_files_name_their_run(tmp_path) -> None:
    (tmp_path / "a[1]-2").mkdir()
    assert run_family(tmp_path / "a[1]") == [tmp_path / "a[1]-2"]
    for name in ("run", "run-2", "run-10", "run-x"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        torch.save({}, tmp_path / name / "checkpoints" / "last.ckpt")
    (tmp_path / "run-11").mkdir()
    assert find_run(tmp_path / "run", "last")[0].name == "run-10"
    assert find_run(tmp_path / "run", str(tmp_path / "run-2"))[0].name == "run-2"
    assert find_run(tmp_path / "run", str(tmp_path / "run/checkpoints/last.ckpt"))[0].name == "run"


def test_run_folder_is_complete_and_its_config_can_be_used_again(finished_run, stories, tmp_path) -> None:
    names = {p.name for p in finished_run.iterdir()}
    assert {"config.yaml", "tokenizer.json", "checkpoints", "loss.png", "weights.png", "summary.json"} <= names
    assert {p.name for p in (finished_run / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert (
        fit(["fit", "--config", str(finished_run / "config.yaml"), f"--trainer.default_root_dir={tmp_path / 'again'}"])
        == 0
    )
    from bitnet.checkpoint import weights_digest

    digests = {weights_digest(read_checkpoint(f)["state_dict"]) for f in (finished_run, tmp_path / "again")}
    assert len(digests) == 1
