"""Runs that tests stop, kill and compare."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitnet.checkpoint import read_checkpoint, weights_digest
from bitnet.training.cli import main as fit

from .conftest import ROOT

STREAM = ("--data.streaming=true", "--data.stream_block=3", "--data.stream_val_bytes=2000")
WINDOW = ("--trainer.accumulate_grad_batches=3",)
SAVES_AT_THE_END = (
    '--trainer.callbacks=[{"class_path":"bitnet.training.callbacks.LastCheckpoint","init_args":'
    '{"every_n_train_steps":1000000}}]'
)
WORKERS = ("--data.workers=2",)


def environment(**more: str) -> dict[str, str]:
    """For a process that imports this checkout, with one thread unless ``more`` says otherwise."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def run_python(*arguments: str, code: int = 0, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` in a process of its own, which must end with ``code``; ``more`` is environment."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


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


def train_in_child(arguments: list[str], cache: str, log: str, hook: Callable[..., None] | None, settings: Any) -> None:
    torch.set_num_threads(1)
    os.environ["BITNET_CACHE"] = cache
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if hook is not None:
        hook(*settings)
    os._exit(fit(arguments))


def start_life(arguments: list[str], log: Path, hook: Callable[..., None] | None = None, *settings: Any) -> Any:
    """A process that trains; ``hook(*settings)`` is called in it first. Imports are paid once, by a fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bitnet.training.cli", "bitnet.training.lit", "tests.runs"])
    cache = os.environ["BITNET_CACHE"]
    process = context.Process(target=train_in_child, args=(arguments, cache, str(log), hook, settings))
    process.start()
    return process


def resume_or_begin(folder: Path) -> list[str]:
    return ["--ckpt_path=last"] if (folder / "checkpoints" / "last.ckpt").exists() else ["--overwrite"]
