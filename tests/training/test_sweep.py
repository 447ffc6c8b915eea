"""``bitnet sweep``: real runs of a second each, compared with single ``fit`` runs and with numpy."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optuna", reason="pip install optuna")

import optuna

from bitnet.__main__ import main
from bitnet.errors import UserError
from bitnet.recipes import BitNet
from bitnet.training.sweep import JOURNAL, Runner, Sweep, parse_grid
from bitnet.training.sweep_report import Point, best_of, is_geometric, numbers, write_report

from ..conftest import ROOT

LOSS = "val/loss"
GRID = ("--grid", "model.optim.lr=2e-3,1e-2", "--grid", "model.recipe.weight+model.recipe.act_bits=none+none")


class OwnRecipe(BitNet):
    """In no list of this library."""


@pytest.fixture(scope="module", autouse=True)
def same_library_in_the_runs() -> None:
    """The processes that a sweep starts import what this one imports, on as many threads."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    os.environ["OMP_NUM_THREADS"] = "1"


def sweep(stories: Path, out: Path, *options: str) -> list[str]:
    fixed = ["--out", str(out), f"--data.path={stories}", "--trainer.accelerator", "cpu"]
    return ["sweep", "overlays/smoke", *fixed, *options]


def loss_of(folder: Path) -> float:
    return json.loads((folder / "summary.json").read_text())["figures"][LOSS]


@pytest.fixture(scope="module")
def done(stories, tmp_path_factory) -> Path:
    """A sweep of the float twin: two learning rates, two seeds."""
    out = tmp_path_factory.mktemp("sweeps") / "done"
    assert main(sweep(stories, out, *GRID, "--seeds=2", "--config", "overlays/muon")) == 0
    return out


def test_a_sweep_needs_no_further_options(tmp_path) -> None:
    wanted = Sweep(config="tiny", axes=parse_grid(["model.optim.lr=1,2"]), seeds=1, out=tmp_path, options=())
    other = Sweep(config="ternary_30m", axes=wanted.axes, seeds=1, out=tmp_path, options=())
    assert wanted.fingerprint() != other.fingerprint()


def test_every_setting_and_seed_is_run(done) -> None:
    folders = {f"lr={lr},weight=none,act_bits=none,seed={seed}" for lr in ("2e-3", "1e-2") for seed in (0, 1)}
    assert {f.parent.name for f in done.glob("*/summary.json")} == folders


def test_results_are_those_of_single_runs(done, stories, tmp_path, run_fit) -> None:
    """Linked values, seeds and further options reach the run; the loss is the same to its last digit."""
    settings = ("--model.optim.lr=1e-2", "--model.recipe.weight=none", "--model.recipe.act_bits=none")
    run_fit(stories, tmp_path / "run", "--config", "overlays/muon", *settings, "--seed_everything=1", "--data.seed=1")
    single = loss_of(tmp_path / "run")
    assert loss_of(done / "lr=1e-2,weight=none,act_bits=none,seed=1") == single
    assert loss_of(done / "lr=1e-2,weight=none,act_bits=none,seed=0") != single


def test_report_has_means_and_deviations_of_the_run_folders(done, stories, capsys) -> None:
    command = sweep(stories, done, *GRID, "--seeds=2", "--config", "overlays/muon", "--report")
    assert main(command) == 0
    shown = capsys.readouterr().out
    points = json.loads((done / "sweep.json").read_text())["points"]
    assert len(points) == 2
    means = []
    for point in points:
        lr, weight, bits = point["settings"].values()
        losses = [loss_of(done / f"lr={lr},weight={weight},act_bits={bits},seed={seed}") for seed in (0, 1)]
        means.append(np.mean(losses))
        assert [point[LOSS]["mean"], point[LOSS]["sd"]] == pytest.approx([np.mean(losses), np.std(losses, ddof=1)])
        cell = f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}"
        assert cell in shown and cell in (done / "sweep.md").read_text()
    assert [point["best"] for point in points] == [mean == min(means) for mean in means]
    assert (done / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_same_command_again_runs_nothing_and_a_larger_grid_only_what_is_new(done, stories, capfd) -> None:
    stamps = {file: file.stat().st_mtime_ns for file in done.glob("*/summary.json")}
    assert main(sweep(stories, done, *GRID, "--seeds=2", "--config", "overlays/muon")) == 0
    assert "run 1" not in (said := capfd.readouterr().out) and "4 of 4 runs are finished already" in said
    larger = [option.replace("lr=2e-3", "lr=4e-3,2e-3") for option in GRID]
    assert main(sweep(stories, done, *larger, "--seeds=3", "--dry_run", "--config", "overlays/muon")) == 0
    said = capfd.readouterr().out
    assert said.count("(finished)") == 4 and said.count("--trainer.default_root_dir") == 5
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps


def test_other_options_do_not_mix_with_a_sweep(done, stories, capsys) -> None:
    for report in ([], ["--report"]):
        assert main(sweep(stories, done, *GRID, "--seeds=2", "--trainer.max_steps=8", *report)) == 2
        assert f"--out {done}: holds a sweep with other options or another config" in capsys.readouterr().err


def test_a_journal_that_a_full_disk_cut_is_read_as_far_as_it_goes(done, tmp_path) -> None:
    whole = (done / JOURNAL).read_text()
    (tmp_path / JOURNAL).write_text(whole + '{"op_code":5,"wor')
    runner = Runner(dataclasses.replace(made("lr=1"), out=tmp_path))
    before = runner.studies()
    optuna.create_study(storage=runner.storage(), study_name="the next")
    assert runner.studies() == [*before, "the next"]
    assert (tmp_path / JOURNAL).read_text().startswith(whole)


def test_why_a_run_has_no_result(stories, tmp_path, capfd) -> None:
    """One that a callback ends early, one that never validates, and one whose folder has half a config only."""
    reached = {"monitor": "val/loss", "stopping_threshold": 100.0}
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": reached}
    stop = f"--trainer.callbacks={json.dumps(stopping)}"
    grid = ("--grid", "model.optim.lr=2e-3")
    assert main(sweep(stories, tmp_path / "early", *grid, stop)) == 1
    assert "it ended after 6 steps; only runs that make all of trainer.max_steps" in capfd.readouterr().out
    never = tmp_path / "never"
    (never / "lr=2e-3,seed=0").mkdir(parents=True)
    (never / JOURNAL).touch()
    (never / "lr=2e-3,seed=0" / ".config.yaml.1.partial").write_text("mod")
    assert main(sweep(stories, never, *grid, "--trainer.limit_val_batches=0")) == 1
    said = capfd.readouterr().out
    assert "without a validation loss; look at trainer.val_check_interval and limit_val_batches" in said


def test_a_recipe_of_somebody_else(stories, tmp_path, capsys) -> None:
    own = "--model.recipe=tests.training.test_sweep.OwnRecipe"
    assert main(sweep(stories, tmp_path / "s", "--grid", "model.optim.lr=1e-3", own, "--dry_run")) == 0
    assert "run 1 of 1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failing_point_is_noted_and_the_others_go_on(stories, tmp_path, capfd) -> None:
    """A learning rate that is refused and one that ends in NaN, both tried again by the next call."""
    command = sweep(stories, tmp_path / "s", "--grid", "model.optim.lr=-1,1e30,5e-3")
    assert main(command) == 1
    said = capfd.readouterr()
    assert "failed: lr = -1, seed 0: lr = -1.0" in said.out
    assert "failed: lr = 1e30, seed 0: step" in said.out and "Traceback" not in said.err
    found = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [len(point["runs"]) for point in found["points"]] == [0, 0, 1] and found["points"][2]["best"]
    assert found["failed"].keys() == {"lr=-1,seed=0", "lr=1e30,seed=0"}
    assert main([*command, "--report"]) == 0
    assert "failed: lr = -1, seed 0: lr = -1.0" in capfd.readouterr().out
    assert main(command) == 1
    said = capfd.readouterr()
    assert "run 2 of 3" in said.out and "run 3 of 3" in said.out and "lr = 5e-3, seed 0" not in said.out


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not there():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_ends_with_the_same_figures(stories, tmp_path, run_fit, capfd) -> None:
    """Stopped inside a run; while it runs, a second process leaves that run alone."""
    out, steps = tmp_path / "s", ("--trainer.max_steps=300", "--trainer.val_check_interval=150")
    command = sweep(stories, out, "--grid", "model.optim.lr=5e-3", *steps)
    first = subprocess.Popen(
        [sys.executable, "-m", "bitnet", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run = out / "lr=5e-3,seed=0"
    wait_for(lambda: (run / "checkpoints" / "last.ckpt").exists(), first)
    assert main(command) == 0
    assert f"{run.name}: under way in another process" in capfd.readouterr().out
    assert not (run / "summary.json").exists()
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130
    assert errors.splitlines()[-1] == "stopped: 0 of 1 runs are finished; the same command goes on"
    assert main([*command, "--dry_run"]) == 0
    assert "--ckpt_path last" in capfd.readouterr().out
    assert main(command) == 0
    run_fit(stories, tmp_path / "single", "--model.optim.lr=5e-3", *steps)
    assert loss_of(run) == loss_of(tmp_path / "single")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "model.optim.lrr=1,2"], "unknown key 'model.optim.lrr'. Did you mean 'model.optim.lr'?"),
        (["--grid", "model.optim.lr=-1,-2"], "lr = -1.0"),
        (["--grid", "model.optim.lr"], "--grid model.optim.lr: write KEY=VALUE,VALUE"),
        (["--grid", "model.optim.lr=1,,2"], "--grid model.optim.lr=1,,2: write KEY=VALUE,VALUE"),
        (["--grid", "model.optim.lr=1,1"], "a value stands there twice"),
        (["--grid", "a+b=1+2,3"], "--grid a+b=1+2,3: '3' has 1 values for 2 keys"),
        (["--grid", "model.optim.lr=1", "--grid", "model.optim.lr=2"], "--grid model.optim.lr: the key is given twice"),
        (["--grid", "seed_everything=1,2"], "--grid seed_everything: --seeds says how many seeds; leave it out."),
        (["--grid", "data.seed=1,2"], "--grid data.seed: --seeds says how many seeds; leave it out."),
        (["--grid", "model.optim.lr=1", "--seeds=0"], "--seeds 0: must be at least 1."),
        (["--grid", "model.optim.lr=1", "--ckpt_path", "last"], "--ckpt_path: an unfinished run goes on by itself"),
        (["--grid", "model.optim.lr=1", "--trainer.max_step=3"], "unknown key 'trainer.max_step'."),
        (["--grid", "model.optim.lr=1", "--report"], "there is no sweep yet"),
    ],
)
def test_bad_options_are_one_line(stories, tmp_path, capsys, options, message) -> None:
    assert main(sweep(stories, tmp_path / "s", *options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_folder_of_something_else_is_left_alone(stories, tmp_path, capsys) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert main(sweep(stories, tmp_path, "--grid", "model.optim.lr=1e-3")) == 2
    assert f"--out {tmp_path}: there is something else than a sweep" in capsys.readouterr().err


def made(*grid: str, seeds: int = 1) -> Sweep:
    return Sweep(config="tiny", axes=parse_grid(list(grid)), seeds=seeds, out=Path("out"), options=())


def test_a_grid_is_the_product_of_its_axes() -> None:
    sweep = made("a.lr=1e-3,2e-3", "b.weight+c.lr=x+1,y+2", seeds=2)
    assert sweep.points[1] == {"a.lr": "1e-3", "b.weight": "y", "c.lr": "2"}
    assert len(sweep.runs) == 8
    assert sweep.runs[3].folder == Path("out/a.lr=1e-3,weight=y,c.lr=2,seed=1")


def test_commas_in_brackets_and_slashes_in_values() -> None:
    sweep = made("betas=[0.9,0.95],[0.9,0.99]", "data.path=a/b,a_b")
    assert [point["betas"] for point in sweep.points[::2]] == ["[0.9,0.95]", "[0.9,0.99]"]
    assert len({run.folder for run in sweep.runs}) == 4
    assert all(run.folder.parent == Path("out") for run in sweep.runs)
    nested = made('data.path=[{"path":"a","weights":[1,2]},b],c').points
    assert [point["data.path"] for point in nested] == ['[{"path":"a","weights":[1,2]},b]', "c"]


def test_bad_links_are_refused_before_anything_else() -> None:
    with pytest.raises(UserError, match="3 values for 2 keys"):
        parse_grid(["a+b=1+2+3"])


def test_axes_of_numbers() -> None:
    assert numbers(made("weight+lr=ternary+3e-3,none+1e-3").axes[0]) == [3e-3, 1e-3]
    assert numbers(made("bits=8,none").axes[0]) is None
    assert is_geometric([1e-3, 2e-3, 5e-3, 1e-2]) and is_geometric([1.0, 100.0, 10.0])
    assert not is_geometric([1, 2, 3]) and not is_geometric([0, 1, 10]) and not is_geometric([1, 2])


def test_a_point_does_not_win_by_losing_a_seed() -> None:
    whole = Point({"lr": "1"}, {0: {"val/bpb": 2.0}, 1: {"val/bpb": 2.2}})
    part = Point({"lr": "2"}, {0: {"val/bpb": 1.5}})
    assert best_of([part, whole]) is whole
    assert best_of([Point({"lr": "1"}, {})]) is None


def test_values_in_brackets_stand_in_the_table(tmp_path, capsys) -> None:
    axes = parse_grid(["data.path=[/a/x.txt,/a/y.txt],[wo,w2]"])
    write_report(Sweep(config="tiny", axes=axes, seeds=1, out=tmp_path, options=()), {})
    printed = capsys.readouterr().out
    assert "[/a/x.txt,/a/y.txt]" in printed and "[wo,w2]" in printed
