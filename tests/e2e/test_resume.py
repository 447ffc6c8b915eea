"""Nothing lost: a run that is stopped or killed at any moment ends with the bits of one that was not."""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.checkpoint import read_checkpoint, weights_digest
from bitnet.training.cli import main as fit
from bitnet.training.lit import LitBitNet

from ..conftest import story_text, tiny_options

KILLS = 20


def run_digest(folder: Path) -> dict[str, str]:
    """Digests of weights, optimizer moments and random state at the end of a run."""
    content = read_checkpoint(folder)
    optimizer = content["optimizer_states"][0]["state"]
    moments = {f"{i}.{k}": torch.as_tensor(v) for i, state in optimizer.items() for k, v in state.items()}
    rng = content["callbacks"]["RandomState"]["torch"]
    return {
        "weights": weights_digest(content["state_dict"]),
        "optimizer": weights_digest(moments),
        "rng": hashlib.sha256(rng.numpy().tobytes()).hexdigest(),
        "step": str(content["global_step"]),
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(3):
        (folder / f"part{i}.txt").write_text(story_text(20, seed=i), encoding="utf-8")
    return folder


STREAM = ("--data.streaming=true", "--data.stream_block=3", "--data.stream_val_bytes=2000")
WINDOW = ("--trainer.accumulate_grad_batches=3",)


WORKERS = ("--data.workers=2",)


@pytest.mark.parametrize(
    "options",
    [(), STREAM, WINDOW, (*STREAM, *WINDOW), WORKERS, (*STREAM, *WINDOW, *WORKERS)],
    ids=["rows", "stream", "window", "both", "rows-workers", "both-workers"],
)
def test_stopped_and_resumed_equals_uninterrupted(text, tmp_path, run_fit, options) -> None:
    steps = 30  # 60 batches of 4 rows an epoch, fewer with accumulation: stops fall inside and between epochs
    alone = tuple(option for option in options if option not in WORKERS)
    run_fit(text, tmp_path / "whole", f"--trainer.max_steps={steps}", *alone)
    folder = tmp_path / "parts"
    run_fit(text, folder, f"--trainer.max_steps={steps}", *options, "--trainer.limit_train_batches=1.0")
    content = read_checkpoint(folder)
    assert content["global_step"] == steps
    for stop in (1, 7, 20):
        parts = tmp_path / f"parts{stop}"
        _stop_after(stop, text, parts, steps, options)
        assert read_checkpoint(parts)["global_step"] == stop
        run_fit(text, parts, f"--trainer.max_steps={steps}", *(alone if stop == 7 else options), "--ckpt_path=last")
        assert run_digest(parts) == run_digest(tmp_path / "whole"), stop


def test_a_stop_inside_the_first_window_after_a_resume_loses_no_batch(text, tmp_path, run_fit) -> None:
    """A save there would count batches as done whose gradients are gone with the process."""
    run_fit(text, tmp_path / "whole", "--trainer.max_steps=12", *WINDOW)
    _stop_after(7, text, tmp_path / "parts", 12, WINDOW)
    _stop_after(7, text, tmp_path / "parts", 12, (*WINDOW, "--ckpt_path=last"), inside_window=True)
    run_fit(text, tmp_path / "parts", "--trainer.max_steps=12", *WINDOW, "--ckpt_path=last")
    assert run_digest(tmp_path / "parts") == run_digest(tmp_path / "whole")


WIDE = ("--model.config.dim=64", "--model.config.ffn_dim=128")  # 8-bit moments begin at 4,096 parameters


@pytest.mark.parametrize("kind,lr,decay", [("muon", 5e-3, 0.1), ("adafactor", 0.05, 0.0), ("adamw8bit", 5e-3, 0.1)])
def test_every_optimizer_learns_and_resumes_with_the_same_bits(text, tmp_path, run_fit, kind, lr, decay) -> None:
    """With the other switches that save memory, so that dropout, schedule and recomputation are restored together."""
    optim = (f"--model.optim.kind={kind}", f"--model.optim.lr={lr}", f"--model.optim.weight_decay={decay}")
    switches = ("--model.loss_chunk=50", "--model.activation_checkpointing=true")
    options = (*WIDE, *optim, *switches)
    run_fit(text, tmp_path / "whole", "--trainer.max_steps=30", *options)
    figures = json.loads((tmp_path / "whole" / "summary.json").read_text())["figures"]
    assert figures["val/loss"] < 5.0  # ln 300 = 5.7 at first
    _stop_after(11, text, tmp_path / "parts", 30, options)
    run_fit(text, tmp_path / "parts", "--trainer.max_steps=30", *options, "--ckpt_path=last")
    assert run_digest(tmp_path / "parts") == run_digest(tmp_path / "whole")


def test_the_state_of_another_optimizer_is_refused_in_one_line(text, tmp_path, run_fit, capsys) -> None:
    run_fit(text, tmp_path / "run", "--trainer.max_steps=2")
    options = ["--model.optim.kind=muon", "--trainer.max_steps=4", "--ckpt_path=last"]
    assert fit([*tiny_options(text, tmp_path / "run"), *options]) == 2
    expected = "error: ckpt_path: that run used optim.kind = adamw, not muon; its state does not fit."
    assert capsys.readouterr().err.strip().splitlines()[-1] == expected


@pytest.mark.parametrize("options", [(), (*STREAM, "--data.workers=1")], ids=["rows", "stream"])
def test_a_run_that_goes_on_with_other_rows_a_step_sees_the_next_row(
    text, tmp_path, run_fit, monkeypatch, options
) -> None:
    """10 steps of 4 rows, 5 of 8, 8 of 3: the first 104 rows of one run of 4 (26 steps), in its order."""
    seen: list[torch.Tensor] = []
    original = LitBitNet.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append(batch["inputs"])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LitBitNet, "training_step", training_step)
    last = ()
    for steps, rows in ((10, 4), (15, 8), (23, 3)):
        run_fit(text, tmp_path / "run", f"--trainer.max_steps={steps}", f"--data.batch_size={rows}", *options, *last)
        last = ("--ckpt_path=last",)
    changed, seen[:] = torch.cat(seen), []
    run_fit(text, tmp_path / "whole", "--trainer.max_steps=26", *options)
    assert torch.equal(changed, torch.cat(seen))


class Stop(Exception):
    """Ends a run from within, after a number of optimizer steps."""


def _stop_after(
    stop: int, text: Path, folder: Path, steps: int, options: tuple[str, ...], inside_window: bool = False
) -> None:
    """Train until ``stop`` optimizer steps are done and, ``inside_window``, some of the batches of the next."""
    from bitnet.training.callbacks import LastCheckpoint

    original = LastCheckpoint.on_train_batch_end

    def stopping(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(self, trainer, *args, **kwargs)
        if trainer.global_step == stop and trainer.fit_loop._should_accumulate() is inside_window:
            raise Stop

    LastCheckpoint.on_train_batch_end = stopping  # type: ignore[method-assign]
    try:
        with pytest.raises(Stop):
            fit([*tiny_options(text, folder), f"--trainer.max_steps={steps}", *options])
    finally:
        LastCheckpoint.on_train_batch_end = original  # type: ignore[method-assign]


def train_in_child(arguments: list[str], cache: str) -> None:
    torch.set_num_threads(1)
    os.environ["BITNET_CACHE"] = cache
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os._exit(fit(arguments))


def kill_when_due(process: Any, checkpoints: Path, chance: random.Random, inside_save: bool) -> bool:
    """SIGKILL at a random moment after at least one new save; True when a half-written file was there."""
    last = checkpoints / "last.ckpt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    while process.is_alive() and (not last.exists() or last.stat().st_mtime_ns == before):
        time.sleep(0.0005)
    due = time.monotonic() + chance.random() * 0.25
    while process.is_alive() and time.monotonic() < due:
        time.sleep(0.0005)
    while inside_save and process.is_alive() and not any(checkpoints.glob(".*.partial")):
        pass
    process.kill()
    process.join()
    return any(checkpoints.glob(".*.partial"))


@pytest.mark.parametrize("options", [(), (*STREAM, *WINDOW)], ids=["rows", "stream-window"])
def test_twenty_kills_end_with_the_same_bits(text, tmp_path, run_fit, options) -> None:
    """SIGKILL at random moments, half of them inside a save; 20 of 20 resume, and the end is bit-identical."""
    chance = random.Random(0)
    steps = "--trainer.max_steps=400"
    quick = (steps, "--trainer.val_check_interval=100000", *options)
    run_fit(text, tmp_path / "whole", *quick)
    folder = tmp_path / "killed"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bitnet.training.cli", "bitnet.training.lit", __name__])
    arguments = [*tiny_options(text, folder), *quick]
    halves = 0
    for kills in itertools.count():
        resume = ["--ckpt_path=last"] if (folder / "checkpoints" / "last.ckpt").exists() else ["--overwrite"]
        process = context.Process(target=train_in_child, args=([*arguments, *resume], os.environ["BITNET_CACHE"]))
        process.start()
        if kills == KILLS:
            process.join()
            assert process.exitcode == 0
            break
        halves += kill_when_due(process, folder / "checkpoints", chance, inside_save=kills % 2 == 0)
        assert process.exitcode == -9, f"life {kills} ended by itself with {process.exitcode}"
    assert halves >= KILLS // 4, "too few kills fell inside a save to prove anything"
    assert run_digest(folder) == run_digest(tmp_path / "whole")
    assert not any((folder / "checkpoints").glob(".*.partial"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]
