"""R: what is broken stops a run or is worked around, and is named in one line."""

import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.checkpoint import read_checkpoint, weights_digest
from bitnet.training.cli import main as fit
from bitnet.training.lit import LitBitNet
from bitnet.training.watch import Watch

from ..conftest import story_text, tiny_options
from ..runs import run_digest, start_life

NAN, INF = float("nan"), float("inf")


def one_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{len(lines)} lines: {text[-500:]}"


# ---- R6


def poison(
    kind: str, value: float, step: int, chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Any]:
    """Break one thing in ``step``; what the message must name, and a list that gets the weights' digest before it."""
    before: list[str] = []
    original = LitBitNet.training_step
    name = ""

    def due(self: LitBitNet) -> bool:
        return self.global_step + 1 == step

    def training_step(self: LitBitNet, batch: Any, batch_idx: int) -> Any:
        if not due(self):
            return original(self, batch, batch_idx)
        parameters = dict(self.transformer.named_parameters())
        if kind == "weight":
            parameters[name].data.view(-1)[chance.randrange(parameters[name].numel())] = value
        before.append(weights_digest(self.transformer.state_dict()))
        if kind == "activation":
            module = self.transformer.get_submodule(name)
            hook = module.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([3]), value))
            try:
                return original(self, batch, batch_idx)
            finally:
                hook.remove()
        return original(self, batch, batch_idx) * (value if kind == "loss" else 1.0)

    def on_after_backward(self: LitBitNet) -> None:
        if due(self) and kind == "gradient":
            gradient = self.transformer.get_parameter(name).grad
            gradient.view(-1)[chance.randrange(gradient.numel())] = value

    layer = f"layers.{chance.randrange(2)}"
    if kind == "activation":
        name = chance.choice(
            [f"{layer}.attention", f"{layer}.feed_forward", f"{layer}.attention.wq", f"{layer}.feed_forward.w2"]
        )
    elif kind != "loss":
        name = chance.choice(
            [f"{layer}.attention.wv.weight", f"{layer}.feed_forward.w1.weight", f"{layer}.ffn_norm.weight"]
        )
    monkeypatch.setattr(LitBitNet, "training_step", training_step)
    monkeypatch.setattr(LitBitNet, "on_after_backward", on_after_backward)
    return (f"{kind} of {name}" if kind in ("weight", "gradient") else "not finite: gradient of "), before


@pytest.mark.slow
@pytest.mark.check(
    "R6", "NaN and infinity in loss, gradient, activation or weight: stopped in that step, tensor named, no update", 20
)
def test_what_is_not_finite_stops_the_run(texts, tmp_path, monkeypatch, capsys, tally) -> None:
    chance = random.Random(0)
    after: list[str] = []
    for trial in range(20):
        kind, value = ("loss", "gradient", "activation", "weight")[trial % 4], (NAN, INF, -INF)[trial % 3]
        step, run = chance.randint(2, 12), tmp_path / str(trial)
        after.clear()
        with monkeypatch.context() as patched:
            names, before = poison(kind, value, step, chance, patched)
            judge = Watch._judge

            def _judge(self: Watch, trainer: Any, step: Any, judge: Any = judge) -> None:
                after.append(weights_digest(trainer.lightning_module.transformer.state_dict()))
                judge(self, trainer, step)

            patched.setattr(Watch, "_judge", _judge)
            capsys.readouterr()
            code = fit(tiny_options(texts, run))
        line, content = one_line(capsys.readouterr().err), read_checkpoint(run)
        tally(
            code == 2
            and line.startswith(f"error: step {step}: the ")
            and names in line
            and (run / "incidents" / f"step_{step}.pt").is_file()
            and after[-1] == before[0]
            and content["global_step"] == step - 1
            and all(tensor.isfinite().all() for tensor in content["state_dict"].values()),
            f"{kind} {value} in step {step} ({names}): {code}, {line}",
        )


# ---- R7


@pytest.mark.slow
@pytest.mark.check("R7", "10 loss spikes are found and 5 ordinary runs raise no alarm", 15)
def test_spikes(texts, tmp_path, monkeypatch, run_fit, tally) -> None:
    original, chance = LitBitNet.training_step, random.Random(0)
    for seed in range(5):
        steps = sorted(chance.sample(range(52, 130, 4), 2))
        for at in ([], steps):

            def training_step(self: LitBitNet, batch: Any, batch_idx: int, at: list[int] = at) -> Any:
                return original(self, batch, batch_idx) * (3.0 if self.global_step + 1 in at else 1.0)

            run = tmp_path / f"{seed}-{len(at)}"
            monkeypatch.setattr(LitBitNet, "training_step", training_step)
            run_fit(
                texts, run, "--trainer.max_steps=130", "--trainer.val_check_interval=1000", f"--seed_everything={seed}"
            )
            found = sorted(int(file.stem.split("_")[1]) for file in (run / "incidents").glob("*"))
            if not at:
                tally(not found, f"run {seed}: false alarms at {found}")
            for step in at:
                tally(step in found and set(found) <= set(at), f"run {seed}: spikes at {at}, found {found}")


# ---- R8


def files_end_at(limit: int) -> None:
    """In a process of its own: no file may grow beyond ``limit`` bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.slow
@pytest.mark.check(
    "R8", "a full disk, at 10 places of a save: one line, the checkpoint from before intact, no partial file", 10
)
def test_full_disk(texts, tmp_path, run_fit, tally) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    run_fit(texts, folder, "--trainer.max_steps=3")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    before, size = checkpoint.read_bytes(), checkpoint.stat().st_size
    for part in range(10):
        limit = 4096 + (size - 4096) * part // 10
        arguments = [*tiny_options(texts, folder), "--trainer.max_steps=9", "--ckpt_path=last"]
        process = start_life(arguments, log, files_end_at, limit)
        process.join()
        said = log.read_text()
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        tally(
            process.exitcode == 2
            and "Traceback" not in said
            and len(errors) == 1
            and "the disk is full (File too large)" in errors[0]
            and checkpoint.read_bytes() == before
            and not list(folder.rglob(".*")),
            f"{limit} of {size} bytes: {process.exitcode}, {said[-600:]}",
        )
    run_fit(texts, folder, "--trainer.max_steps=4", "--ckpt_path=last")


# ---- R9

CHANGED = {
    "--model.optim.lr=1e-3": ("warning", "model.optim.lr = 0.001, but 0.005"),
    "--model.config.dim=64": ("error", "model.config.dim is 32 there and 64 here"),
    "--data.seed=5": ("warning", "data.seed = 5, but 0"),
    "--data.path=OTHER": ("warning", "data.path: sha256 of the text = "),
    "--data.vocab_size=280": ("error", "another tokenizer (300 tokens, sha256 "),
    "--data.batch_size=2": ("warning", "data.batch_size = 2, but 4"),
    "--model.recipe.weight=binary": ("error", "model.recipe.init_args.weight = binary, but the run has ternary"),
    "--model.recipe.learned_scale=true": ("error", "learned_scale = True, but the run has False"),
    "--model.recipe.act_bits=none": ("warning", "model.recipe.init_args.act_bits = none, but 8"),
    "--model.optim.kind=muon": ("error", "that run used optim.kind = adamw, not muon"),
    "--model.schedule.kind=cosine": ("warning", "model.schedule.kind = cosine, but two_stage"),
    "--data.seq_len=16": ("warning", "data.seq_len = 16, but 32"),
    "--trainer.precision=bf16-mixed": ("warning", "trainer.precision = bf16-mixed, but None"),
    "--trainer.accumulate_grad_batches=2": ("warning", "trainer.accumulate_grad_batches = 2, but 1"),
    "--model.config.dropout=0.2": ("warning", "model.config.dropout = 0.2, but 0.1"),
    "--model.loss_chunk=16": ("warning", "model.loss_chunk = 16, but None"),
}


def kept_run(run_fit: Any, texts: Path, tmp_path: Path, steps: int) -> Path:
    """A run that was trained as ``run`` and lies in ``kept``, to be copied back and spoiled."""
    run_fit(texts, tmp_path / "run", f"--trainer.max_steps={steps}")
    return (tmp_path / "run").rename(tmp_path / "kept")


@pytest.mark.check(
    "R9", "a setting that changed between stop and resume is refused or named, with old and new value", 17
)
def test_changed_settings(texts, tmp_path, run_fit, capsys, tally) -> None:
    folder, kept = tmp_path / "run", kept_run(run_fit, texts, tmp_path, 3)
    tokenizer = f"--data.tokenizer={kept / 'tokenizer.json'}"
    (tmp_path / "other.txt").write_text(story_text(40, seed=9), encoding="utf-8")
    same = ["--trainer.max_steps=4", "--trainer.val_check_interval=1000", "--ckpt_path=last"]
    threads = torch.get_num_threads()
    for option, (kind, says) in {**CHANGED, "threads": ("warning", "threads = 2, but 1"), "": ("nothing", "")}.items():
        shutil.copytree(kept, folder)
        options = (
            [option.replace("OTHER", str(tmp_path / "other.txt")), tokenizer]
            if "data.path" in option or "seed" in option
            else [option]
        )
        if option == "threads":
            options = []
            torch.set_num_threads(2)
        capsys.readouterr()
        try:
            code = fit([*tiny_options(texts, folder), *same, *filter(None, options)])
        finally:
            torch.set_num_threads(threads)
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if "trainer.max_steps = 4, but 3" not in line]
        good = (code == (2 if kind == "error" else 0)) and len(lines) == (kind != "nothing")
        if kind == "error":  # nor has the refusal changed the config that the run goes on with
            good = good and (folder / "config.yaml").read_bytes() == (kept / "config.yaml").read_bytes()
        tally(
            good and all(line.startswith(f"{kind}: ") and says in line for line in lines), f"{option}: {code}, {said}"
        )
        shutil.rmtree(folder)


# ---- R10

Damage = Callable[[bytearray, random.Random], bytes]


def with_flip(data: bytearray, place: int) -> bytes:
    data[place] ^= 1 << place % 8
    return bytes(data)


DAMAGES: dict[str, Damage] = {
    "empty": lambda data, _: b"",
    "half": lambda data, _: bytes(data[: len(data) // 2]),
    "a byte short": lambda data, _: bytes(data[:-1]),
    "a block of zeros": lambda data, _: bytes(data[:5000]) + bytes(4096) + bytes(data[9096:]),
    "other bytes": lambda data, chance: chance.randbytes(len(data)),
    "a page twice": lambda data, _: bytes(data[:8192]) + bytes(data[4096:8192]) + bytes(data[12288:]),
    "no file of ours": lambda data, _: b"text\n" * 1000,
    "a flipped bit in a weight": lambda data, _: with_flip(data, data.index(b"data/7") + 2000),
    "a flipped bit in the pickle": lambda data, _: with_flip(data, data.index(b"state_dict") + 3),
    "a flipped bit in the directory": lambda data, _: with_flip(data, data.rindex(b"PK\x01\x02")),
}


@pytest.mark.check(
    "R10", "the newest checkpoint damaged in 10 ways: the one before is taken, and named; none left is said", 60
)
def test_damaged_checkpoints(texts, tmp_path, run_fit, capsys, tally) -> None:
    folder, kept = tmp_path / "run", kept_run(run_fit, texts, tmp_path, 8)
    chance = random.Random(0)
    for name, damage in DAMAGES.items():
        shutil.copytree(kept, folder)
        last, previous = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "previous.ckpt"
        last.write_bytes(damage(bytearray(last.read_bytes()), chance))
        arguments = [*tiny_options(texts, folder), "--trainer.max_steps=8", "--ckpt_path=last"]
        capsys.readouterr()
        code, said = fit(arguments), capsys.readouterr().err
        named = f"{last} is damaged (" in said and f"going on from {previous}." in said
        tally(code == 0 and named and said.count("is damaged") == 1, f"{name}: {code}, {said}")
        tally(run_digest(folder) == run_digest(kept), f"{name}: other bits")
        for file in (last, previous):
            file.write_bytes(damage(bytearray(file.read_bytes()), chance))
        code, said = fit(arguments), one_line(capsys.readouterr().err)
        tally(
            code == 2 and said.startswith("error: ") and "nothing to go on from" in said,
            f"{name}, both: {code}, {said}",
        )
        shutil.rmtree(folder)
    flips_in_every_part(kept / "checkpoints" / "last.ckpt", tmp_path / "flipped.ckpt", chance, tally)


def flips_in_every_part(file: Path, flipped: Path, chance: random.Random, tally: Any) -> None:
    """A bit anywhere in the file: refused, or without any effect."""
    data, expected = file.read_bytes(), run_digest(file)
    for _ in range(30):
        place = chance.randrange(len(data))
        flipped.write_bytes(with_flip(bytearray(data), place))
        try:
            held = run_digest(flipped) == expected
        except ValueError:
            held = True
        tally(held, f"bit flipped at {place} of {os.path.getsize(file)}")
