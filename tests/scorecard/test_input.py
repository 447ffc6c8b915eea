"""I: what a user gets wrong is one line and exit code 2, before any work."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models

from bitnet.__main__ import main as bitnet
from bitnet.data.tokens import TokenStore
from bitnet.training.cli import main as fit
from tests.conftest import tiny_options
from tests.data.conftest import run_prepare
from tests.data.test_corpora import BAD
from tests.scorecard.trials import PATIENCE, refusal

__all__ = ["run_prepare"]

TYPOS = {
    "--model.config.dimm=4": "model.config.dim'",
    "--model.config.nlayers=4": "model.config.n_layers'",
    "--model.optim.learning_rate=1": "model.optim.lr",
    "--model.optim.weigth_decay=1": "model.optim.weight_decay'",
    "--model.schedule.warmup=1": "model.schedule.warmup_steps'",
    "--model.recipe.wieght=ternary": "weight'",
    "--model.recipe.actbits=8": "act_bits'",
    "--model.init_form=x": "model.init_from'",
    "--data.pth=x": "data.path'",
    "--data.batchsize=3": "data.batch_size'",
    "--data.seqlen=3": "data.seq_len'",
    "--data.val_frac=3": "data.val_fraction'",
    "--trainer.max_step=3": "trainer.max_steps'",
    "--trainer.device=3": "trainer.devices'",
    "--trainer.precison=3": "trainer.precision'",
    "--seed_everythin=3": "seed_everything'",
    "--overwrit": "overwrite'",
    "--ckpt_pth=last": "ckpt_path'",
}
YAML = [
    ({"model": {"config": {"dmi": 4}}}, "'model.config.dmi'. Did you mean 'model.config.dim'?"),
    ({"model": {"confg": {"dim": 4}}}, "model.config"),
    ({"modell": {"config": {"dim": 4}}}, "'modell.config.dim'. Did you mean 'model.config.dim'?"),
    ({"trainer": {"max_stesp": 4}}, "trainer.max_steps"),
    ({"data": {"vocabsize": 4}}, "data.vocab_size"),
    ({"model": {"recipe": {"class_path": "bitnet.recipes.BitNet", "init_args": {"wight": "binary"}}}}, "'weight'"),
]
VALUES = {
    "--model.config.dim=wide": "model.config.dim = wide: expected int",
    "--model.config.dim=30": "dim = 30 is not a multiple of n_heads = 4",
    "--model.recipe.weight=quaternary": "weight = quaternary: expected one of 'ternary', 'binary', 'none'",
    "--model.recipe.act_bits=5": "act_bits = 5: expected one of 8, 4, 'none'",
    "--model.schedule.kind=linaer": "model.schedule.kind = linaer: expected one of 'two_stage'",
    "--data.val_split=first": "data.val_split = first: expected one of 'random', 'last'",
    "--data.vocab_size=100": "data.vocab_size = 100: byte-level BPE needs at least 257",
    "--data.batch_size=0": "data.batch_size = 0",
    "--data.val_fraction=1.5": "data.val_fraction = 1.5",
    "--data.val_batch_size=-1": "data.val_batch_size = -1: must be at least 1",
    "--data.seed=-1": "data.seed = -1: must be 0 or more",
    "--data.weights=[1,2]": "data.weights has 2 numbers for 1 paths",
    "--data.weights=[.nan]": "data.weights = [nan]: each must be a number",
    "--data.eos_token=</s>": "data.eos_token = </s>: a tokenizer that is trained here ends texts with <|endoftext|>",
    "--data.tokenizer=nowhere.json": "nowhere.json: no such tokenizer file",
    "--model.init_from=nowhere": "nowhere: no such run folder",
    "--ckpt_path=nowhere.ckpt": "nowhere.ckpt: no such checkpoint",
    "--ckpt_path=last": "has saved a checkpoint yet",
    "--trainer.accelerator=cuda": "CUDAAccelerator",
    "--trainer.precision=fp99": "trainer.precision",
    "--trainer.precision=transformer-engine": "transformer_engine",
    "--trainer.gradient_clip_val=-1": "trainer.gradient_clip_val = -1: must be 0 or more",
    "--trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches = 0: must be 1 or more",
    "--trainer.val_check_interval=0": "trainer.val_check_interval = 0: must be more",
    '--trainer.callbacks={"class_path":"bitnet.training.callbacks.LastCheckpoint","init_args":'
    '{"every_n_train_steps":-1}}': "LastCheckpoint: Invalid value for every_n_train_steps=-1. Must be >= 0",
    "--trainer.overfit_batches=1": "trainer.overfit_batches = 1: would take other rows in each epoch",
    "--seed_everything=-3": "-3 is not in bounds",
    "--config=tinny": "no such file, and no shipped config. Did you mean 'tiny'?",
}


def line_of(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The single line on stderr of a command that has ended with 2; an empty string for anything else."""
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[0] if code == 2 and len(lines) == 1 and lines[0].startswith("error: ") else ""


@pytest.mark.check("I1", "typos and wrong values are refused before any work, with the nearest key", 50)
def test_configs(tmp_path, stories, capsys, tally) -> None:
    run = tmp_path / "run"
    for typo, nearest in TYPOS.items():
        line = line_of(capsys, fit([*tiny_options(tmp_path / "no.txt", run), typo]))
        tally("unknown key" in line and nearest in line and not run.exists(), f"{typo}: {line}")
    for content, named in YAML:
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content))
        line = line_of(capsys, fit([*tiny_options(tmp_path / "no.txt", run), f"--config={tmp_path / 'bad.yaml'}"]))
        tally("unknown key" in line and named in line and not run.exists(), f"{content}: {line}")
    for option, message in VALUES.items():
        line = line_of(capsys, fit([*tiny_options(stories, run), option]))
        tally(message in line and not run.exists(), f"{option}: {line}")


def bpe(vocab: dict[str, int]) -> Tokenizer:
    made = Tokenizer(models.BPE(vocab, []))
    made.decoder = decoders.ByteLevel()
    return made


@pytest.mark.check("I2", "a tokenizer that does not fit ids, model or run is refused before the first step", 9)
def test_tokenizers(finished_run, stories, tmp_path, capsys, run_prepare, tally) -> None:
    tokens = tmp_path / "tokens"
    assert bitnet(["prepare", "--data.path", str(stories), "--data.vocab_size", "300", "--out", str(tokens)]) == 0
    TokenStore(tokens).ids("val")
    capsys.readouterr()
    before = {file: file.read_bytes() for file in finished_run.rglob("*") if file.is_file()}
    resumed = [*tiny_options(stories, finished_run), f"--ckpt_path={finished_run / 'checkpoints' / 'last.ckpt'}"]
    started = [*tiny_options(stories, tmp_path / "run"), f"--model.init_from={finished_run}"]
    for name, arguments, words in (
        ("resumed with another", [*resumed, "--data.vocab_size=280"], "another tokenizer"),
        ("resumed with another model", [*resumed, "--model.config.dim=64"], "dim is 32 there and 64 here"),
        ("started from another", [*started, "--data.vocab_size=280"], "another tokenizer"),
    ):
        line = line_of(capsys, fit(arguments))
        tally(words in line and not (tmp_path / "run").exists(), f"{name}: {line}")
    assert {file: file.read_bytes() for file in finished_run.rglob("*") if file.is_file()} == before

    def store(name: str, file: str, content: bytes) -> None:
        """A token folder in which one file is another: what ``fit`` says of it."""
        folder = tmp_path / name
        shutil.copytree(tokens, folder)
        (folder / file).write_bytes(content)
        line = line_of(capsys, fit(tiny_options(folder, tmp_path / "run")))
        tally(str(folder / file) in line and not (tmp_path / "run").exists(), f"{name}: {line}")

    changed = json.loads((tokens / "tokenizer.json").read_text())
    merges = changed["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    store("of the same size", "tokenizer.json", json.dumps(changed).encode())
    store("of another size", "tokenizer.json", bpe({"a": 0, "<|endoftext|>": 1}).to_str().encode())
    store("no tokenizer", "tokenizer.json", b"{}")
    ids = np.fromfile(tokens / "train-0.bin", "<u2")
    ids[7] = 300
    store("an id beyond", "train-0.bin", ids.tobytes())
    for name, vocab, words in (
        ("no end", {"a": 0, "b": 1}, "data.eos_token"),
        ("gaps", {"a": 0, "<|endoftext|>": 9}, "without gaps"),
    ):
        bpe(vocab).save(str(tmp_path / "tokenizer.json"))
        said = refusal(lambda: run_prepare(stories, tokenizer=str(tmp_path)), words)
        tally(bool(said), f"{name}: {said}")


@pytest.mark.check("I3", "every bad source of text is named in one line, and a word of a million letters is read", 19)
def test_sources(tmp_path, run_prepare, tally) -> None:
    for name, (content, words) in BAD.items():
        (tmp_path / name).write_bytes(content)
        said = refusal(lambda name=name: run_prepare(tmp_path / name), tmp_path / name, words)
        tally(bool(said), f"{name}: {said}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("A few words only.\nAnd a second line of them.")
    for path, words in (
        ("nowhere.txt", "no such file"),
        ("*.nothing", "no file matches"),
        ("empty", "no text files"),
        ("short.txt", "a batch needs 2"),
    ):
        said = refusal(lambda path=path: run_prepare(tmp_path / path), words)
        tally(bool(said), f"{path}: {said}")
    folder = Path(tempfile.mkdtemp())  # others may look into it, unlike tmp_path
    try:
        folder.chmod(0o755)
        (folder / "a.txt").write_text("text")
        (folder / "a.txt").chmod(0)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may read everything
        try:
            said = refusal(lambda: run_prepare(folder / "a.txt"), folder / "a.txt", "ermission")
        finally:
            os.seteuid(user)
        tally(bool(said), f"no permission: {said}")
    finally:
        shutil.rmtree(folder)
    (tmp_path / "huge.txt").write_text("x" * 1_000_000 + "\n<|endoftext|>\n" + "Words. " * 400)
    started = time.monotonic()
    store = run_prepare(tmp_path / "huge.txt")
    seconds = time.monotonic() - started
    tally(store.totals("train-0").tokens > 0 and seconds < 3 * PATIENCE, f"a huge word: {seconds:.1f} s")
