"""The command line: run folders, shipped configs, and one clear line with exit code 2 for each kind of bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitnet.__main__ import main as bitnet
from bitnet.__main__ import train
from bitnet.checkpoint import read_checkpoint
from bitnet.training.cli import main as fit
from bitnet.training.cli import parse_config

from .conftest import tiny_options
from .runs import environment


def error_of(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The single line on stderr of a command that has ended with 2."""
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_missing_data(capsys, tmp_path) -> None:
    line = error_of(capsys, fit(tiny_options(tmp_path / "no.txt", tmp_path / "run")))
    assert f"{tmp_path / 'no.txt'}: no such file or folder" in line


@pytest.mark.parametrize(
    "args,message",
    [
        (["generat"], "invalid choice: 'generat'"),
        (["generate", "nowhere", "--prompt", "a"], "nowhere: no such run, checkpoint, packed model"),
        (["generate", "x", "--prompt", "a", "--topk", "3"], "--topk. Did you mean '--top_k'?"),
        (["generate", "x", "--prompt", "a", "--temperature", "-1"], "temperature = -1.0"),
        (["generate", "x", "--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens 0"),
        (["evaluate", "x"], "--data.path"),
        (["generate", "x", "--prompt", "a", "--temperature", "1e-45"], "temperature = 1e-45: must be 0, or 0.0001"),
        (["generate", "x", "--prompt", "a", "--seed", "9" * 20], "seed = 99999999999999999999: must be a number of 64"),
        (["generate", "x", "--prompt", "\udcff"], "--prompt: has bytes that are not UTF-8"),
        (["inspect", "nowhere"], "no shipped config"),
        (["inspect", "tiny", "--json", "o.json"], "--json goes with --devices"),
        (["inspect", "tiny", "--verify"], "--verify checks the digests of a packed model"),
        (["inspect", "tiny", "--devices", "8", "--verify"], "--verify checks the digests of a packed model"),
        (["inspect", "tiny", "--gpu", "a100"], "--gpu goes with --devices"),
        (["inspect", "posttrain/qat"], "QAT takes its sizes from model.init_from; inspect that"),
        (["inspect", "posttrain/qat", "--model.config.dim=96"], "QAT takes its sizes from model.init_from"),
        (["inspect", "posttrain/distilled"], "Distilled takes its sizes from model.init_from"),
        (["bench", "kernels", "--json", "."], "--json .: is a folder"),
        (["bench", "train", "--config", "tiny", "--rows", "0"], "--rows 0: must be at least 1"),
        (["inspect", "tiny", "--model.config.dimm", "3"], "Did you mean 'model.config.dim'?"),
        (["fit", "--confg", "tiny"], "Did you mean 'config'?"),
    ],
)
def test_other_commands(capsys, args, message) -> None:
    assert message in error_of(capsys, bitnet(args))


def test_train_py_needs_no_subcommand(capsys, tmp_path) -> None:
    """``python train.py`` trains, so ``python train.py --config tiny`` does, too."""
    options = tiny_options(tmp_path / "no.txt", tmp_path / "run")[1:]
    assert f"{tmp_path / 'no.txt'}: no such file or folder" in error_of(capsys, train(options))
    assert "Did you mean 'config'?" in error_of(capsys, train(["--confg", "tiny"]))


@pytest.mark.parametrize(
    ("given", "configs"),
    [
        ([], ["tiny"]),
        (["--trainer.max_steps=3"], ["tiny"]),
        (["fit", "--trainer.max_steps=3", "--debug"], ["tiny"]),
        (["--config=overlays/smoke"], ["smoke"]),
        (["--config=overlays/bf16", "-c", "overlays/muon"], ["tiny", "bf16", "muon"]),
        (["-c", "ternary_30m", "--config=overlays/bf16"], ["ternary_30m", "bf16"]),
        (["-c=ternary_30m"], ["ternary_30m"]),
        (["--config=overlays/own.yaml"], ["own"]),  # a file of the user's
        (["--config=overlays/muon", "--print_config"], ["tiny", "muon"]),
        (
            ["fit", "--trainer.max_steps=3", "--config", "overlays/smoke", "--config", "overlays/muon"],
            ["smoke", "muon"],
        ),
        (["--help"], []),
    ],
)
def test_options_without_a_config_change_tiny(monkeypatch, tmp_path, given, configs) -> None:
    """And come behind it, or it would undo them; so do overlays. A config with a model of its own stands alone."""
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays" / "own.yaml").touch()
    monkeypatch.chdir(tmp_path)
    seen: list[list[str]] = []
    monkeypatch.setattr("bitnet.training.cli.make_cli", seen.append)
    assert fit(given) == 0
    (arguments,) = seen
    named = [Path(word).stem for word in arguments if word.endswith(".yaml")]
    assert arguments[0] == "fit" and named == configs
    if "--trainer.max_steps=3" in given and configs == ["tiny"]:
        assert arguments.index("--trainer.max_steps=3") == 3


def test_other_commands_read_overlays_as_fit_does() -> None:
    tiny = parse_config(["--config", "tiny"])
    found = parse_config(["--config", "overlays/muon", "--model.optim.lr=0.5"])
    assert found.model == tiny.model and found.optim == replace(tiny.optim, lr=0.5)


def test_what_a_callback_says_while_it_is_made_is_kept(capsys, monkeypatch, tmp_path) -> None:
    """jsonargparse puts it on a line of its own, among all that a callback is not."""
    (tmp_path / "own.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Own(Callback):\n    def __init__(self):\n        raise ImportError('needs another package')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for callbacks in ('{"class_path":"own.Own"}', '[{"class_path":"own.Own"}]'):
        options = [*tiny_options(tmp_path / "no.txt", tmp_path / "run"), f"--trainer.callbacks={callbacks}"]
        assert re.search(r"own\.Own.* needs another package", error_of(capsys, fit(options)))


def test_ctrl_c_while_modules_are_imported_is_one_line(monkeypatch, capsys) -> None:
    """They take seconds. An import that is interrupted raises from its finder as well as from anywhere else."""

    class Interrupted:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "bitnet.training.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "bitnet.training.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted, *sys.meta_path])
    for command in (lambda: bitnet(["fit", "--config", "tiny"]), lambda: train([])):
        assert command() == 128 + signal.SIGINT
        assert capsys.readouterr().err == "interrupted\n"


def test_debug_shows_the_traceback(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        fit([*tiny_options(tmp_path / "no.txt", tmp_path / "run"), "--debug"])


@pytest.mark.parametrize(
    "args,unbuffered",
    [
        (["inspect", "tiny"], ""),  # a table of rich
        (["inspect", "tiny"], "1"),
        (["--help"], ""),  # argparse, which ignores errors of write and leaves the buffer to the end of Python
    ],
)
def test_a_reader_that_goes_is_no_error(args, unbuffered) -> None:
    """As in ``bitnet inspect tiny | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "bitnet", *args]
    output = {"stdout": writer, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run(command, env=environment(PYTHONUNBUFFERED=unbuffered), **output)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_tensorboard_tags(finished_run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_run))
    events.Reload()
    tags = events.Tags()
    assert {
        *("train/loss", "val/loss", "val/bpb", "quant/zero_fraction", "quant/flip_rate", "perf/tokens_per_s"),
        *(
            "perf/flops_per_s",
            "perf/loader_share",
            "perf/memory_gb",
            "train/lr",
            "train/weight_decay",
            "train/grad_norm",
        ),
    } <= set(tags["scalars"])
    assert sum(t.startswith("weights/") for t in tags["histograms"]) == 14
    overview = {t for t in tags["scalars"] if t.startswith("overview/")}
    assert len(overview) == 6 and "overview/sample_text" in tags["images"]
    groups = sorted({t.partition("/")[0] for kind in ("scalars", "images", "histograms") for t in tags[kind]})
    assert groups[0] == "overview"  # TensorBoard opens the first two groups by name
    assert "samples/text/text_summary" in tags["tensors"]
    assert [e.step for e in events.Scalars("val/loss")] == [6, 12, 18, 24, 30]
    assert all(0 < e.value < 0.2 for e in events.Scalars("quant/flip_rate")[2:])
    assert all(0.2 < e.value < 0.4 for e in events.Scalars("quant/zero_fraction"))
    losses = [e.value for e in events.Scalars("train/loss")]
    assert losses[-1] < losses[0] - 1.0


def test_several_paths_with_weights(tmp_path, stories, run_fit) -> None:
    other = tmp_path / "other.txt"
    other.write_text(stories.read_text().upper())
    run_fit(
        stories, tmp_path / "run", "--trainer.max_steps=2", f"--data.path=[{stories},{other}]", "--data.weights=[1,3]"
    )
    data = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    assert data["paths"] == [str(stories), str(other)] and len(data["train"]) == 2


def test_a_config_without_callbacks_still_leaves_a_checkpoint(tmp_path, stories, run_fit) -> None:
    run_fit(stories, tmp_path / "run", "--trainer.max_steps=2", "--trainer.callbacks=null")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("steps", [3, 8])
def test_a_run_ends_with_a_validation_whatever_the_interval(tmp_path, stories, run_fit, steps) -> None:
    run_fit(stories, tmp_path / "run", f"--trainer.max_steps={steps}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "val/bpb" in summary["figures"] and (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [e.step for e in events.Scalars("val/bpb")] == ([3] if steps == 3 else [6, 8])


def test_generate_and_evaluate_a_run(finished_run, stories, capsys) -> None:
    assert bitnet(["generate", str(finished_run), "--prompt", "The small", "--max_new_tokens", "8", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("The small") and len(first) > 10
    assert bitnet(["generate", str(finished_run), "--prompt", "The small", "--max_new_tokens", "8", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first
    assert bitnet(["evaluate", str(finished_run), "--data.path", str(stories), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["documents"] == 60 and 1.0 < result["bits_per_byte"] < 5.0
    assert result["text_bytes"] == sum(
        len(d.strip("\n").encode()) for d in Path(stories).read_text().split("<|endoftext|>")
    )


def test_evaluate_agrees_with_the_validation_of_the_run(stories, tmp_path, run_fit, capsys) -> None:
    """The same held-out text, once by the trainer and once by the command."""
    held = tmp_path / "held.txt"
    held.write_text(Path(stories).read_text()[:3000])
    folder = tmp_path / "run"
    run_fit(stories, folder, "--trainer.max_steps=6", f"--data.val_path={held}", "--trainer.limit_val_batches=1.0")
    figures = json.loads((folder / "summary.json").read_text())["figures"]
    capsys.readouterr()
    assert bitnet(["evaluate", str(folder), "--data.path", str(held), "--json", "--batch_size", "4"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loss"] == pytest.approx(figures["val/loss"], rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(figures["val/bpb"], rel=1e-5)


def test_inspect_config_and_run(finished_run, capsys) -> None:
    assert bitnet(["inspect", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "3,151,104" in out and "export hf" in out
    assert bitnet(["inspect", "posttrain/distilled", "--model.config.dim=96"]) == 0  # says its sizes
    capsys.readouterr()
    assert bitnet(["inspect", str(finished_run)]) == 0
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if line.startswith("layers.0.attention.wq"))
    w = read_checkpoint(finished_run)["state_dict"]["model.layers.0.attention.wq.weight"].double()
    q = (w / w.abs().mean()).round().clamp(-1, 1)
    shares = [f"{float((q == level).double().mean()):.1%}" for level in (-1, 0, 1)]
    assert row == ["layers.0.attention.wq", "32", "x", "32", *shares, f"{float(w.abs().mean()):.5f}"]


def test_prepare_makes_a_folder_that_fit_takes(stories, tmp_path, run_fit, capsys) -> None:
    tokens = tmp_path / "tokens"
    assert bitnet(["prepare", "--data.path", str(stories), "--data.vocab_size", "300", "--out", str(tokens)]) == 0
    assert bitnet(["prepare", "--data.path", str(stories), "--out", str(tokens)]) == 2
    run_fit(tokens, tmp_path / "run", "--trainer.max_steps=2")


def test_init_from_takes_weights_of_another_recipe_and_refuses_other_sizes(
    finished_run, stories, tmp_path, capsys
) -> None:
    options = [
        *tiny_options(stories, tmp_path / "run"),
        f"--model.init_from={finished_run}",
        "--model.recipe.weight=binary",
    ]
    assert fit([*options, "--trainer.max_steps=1"]) == 0
    capsys.readouterr()
    line = error_of(capsys, fit([*options, "--model.config.n_layers=1"]))
    assert "model.config.n_layers is 2 there and 1 here" in line


def test_init_from_multiplies_trained_factors_into_the_weights(stories, tmp_path, run_fit, capsys) -> None:
    """The new run begins with the function that the old one had; only the rounding of products differs."""
    learned = ("--model.recipe.scale_per=row", "--model.recipe.learned_scale=true")
    run_fit(stories, tmp_path / "old", *learned, "--trainer.max_steps=20", "--model.optim.lr=0.05")
    content = read_checkpoint(tmp_path / "old")
    name = "model.layers.0.attention.wq"
    factor, weight = content["state_dict"][f"{name}.factor"], content["state_dict"][f"{name}.weight"]
    assert (factor - 1).abs().max() > 0.01
    still = ("--trainer.max_steps=1", "--model.optim.lr=1e-30", "--model.optim.weight_decay=0")
    run_fit(stories, tmp_path / "new", *learned, *still, f"--model.init_from={tmp_path / 'old'}")
    new = read_checkpoint(tmp_path / "new")["state_dict"]
    assert torch.equal(new[f"{name}.weight"], weight * factor) and torch.equal(
        new[f"{name}.factor"], torch.ones_like(factor)
    )
    run_fit(stories, tmp_path / "plain", *still, f"--model.init_from={tmp_path / 'old'}")
    capsys.readouterr()
    line = error_of(
        capsys, fit([*tiny_options(stories, tmp_path / "old"), "--ckpt_path=last", "--trainer.max_steps=21"])
    )
    assert "scale_per = matrix, but the run has row; begin a new run from its weights" in line


def test_a_low_bit_parent_of_a_recipe_that_begins_in_float_is_named(finished_run, stories, tmp_path, capsys) -> None:
    options = [*tiny_options(stories, tmp_path / "run"), f"--model.init_from={finished_run}", "--trainer.max_steps=1"]
    for late, warned in (([], False), (["--model.recipe.quantize_from=0.5"], True)):
        assert fit([*options, *late]) == 0
        said = capsys.readouterr().err
        assert (f"warning: model.init_from = {finished_run} is a low-bit model" in said) == warned
        assert ("set model.recipe.quantize_from = 0" in said) == warned
    assert fit([*options, *late, "--trainer.max_steps=2", "--ckpt_path=last"]) == 0
    assert "is a low-bit model" not in capsys.readouterr().err  # it was said when the run began


def test_a_blend_that_is_longer_than_the_run_is_named(stories, tmp_path, capsys) -> None:
    options = [*tiny_options(stories, tmp_path / "run"), "--trainer.max_steps=4", "--model.recipe.quantizer_warmup=16"]
    assert fit(options) == 0
    said = "warning: the run ends after 4 steps, when quantizer_warmup has brought 25% of the low bits."
    assert said in capsys.readouterr().err


def test_the_loss_of_a_step_is_that_of_all_its_batches(stories, tmp_path, run_fit) -> None:
    """The first step on 12 rows, as three batches and as one."""
    losses = []
    for rows, batches in ((4, 3), (12, 1)):
        size = ("--model.config.dropout=0", f"--data.batch_size={rows}", f"--trainer.accumulate_grad_batches={batches}")
        run_fit(stories, tmp_path / str(rows), *size, "--trainer.max_steps=1", "--trainer.val_check_interval=3")
        losses.append(json.loads((tmp_path / str(rows) / "summary.json").read_text())["figures"]["train/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("options", [("--trainer.log_every_n_steps=0",), ("--data.seq_len=4",)])
def test_no_figures_between_and_rows_shorter_than_a_prompt(stories, tmp_path, run_fit, options) -> None:
    run_fit(stories, tmp_path / "run", "--trainer.max_steps=3", *options)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["figures"]["train/loss"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_export_leaves_nothing(finished_run, tmp_path, monkeypatch, capsys, number) -> None:
    from bitnet.interchange import exporting

    # What a shell starts in the background, these tests perhaps, ignores Ctrl-C unless it is told otherwise.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def stopped(folder: Path, *args: object, **options: object) -> None:
        (folder / "half").write_text("written")
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(exporting, "write_hf", stopped)
    arguments = ["export", str(finished_run), "--format", "hf", "--out", str(tmp_path / "out")]
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as ended:
            bitnet(arguments)
        assert ended.value.code == 143
    else:
        assert bitnet(arguments) == 130
        assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []
