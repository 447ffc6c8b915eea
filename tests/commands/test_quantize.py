"""``bitnet quantize``, ``synthesize`` and the post-training configs, as a user types them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.__main__ import main
from bitnet.checkpoint import load_checkpoint, read_checkpoint
from bitnet.commands.quantize import RECIPE_NAMES
from bitnet.data.tokens import UNSAID, TokenStore
from bitnet.errors import UserError
from bitnet.inference.files import load_packed
from bitnet.layers import quantized_layers
from bitnet.recipes import POST_TRAINING, EfficientQAT
from bitnet.training.cli import main as fit

FLOAT = ["--model.recipe.weight=none", "--model.recipe.act_bits=none", "--model.config.dim=64"]
FLOAT += ["--model.config.ffn_dim=64"]


@pytest.fixture(scope="module")
def float_run(stories: Path, tmp_path_factory: pytest.TempPathFactory, run_fit: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("float") / "run"
    run_fit(stories, folder, *FLOAT, "--trainer.max_steps=40", "--model.optim.lr=5e-3")
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert main(list(command)) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    return error


def test_names_on_the_command_line_are_those_of_the_recipes() -> None:
    assert set(RECIPE_NAMES) == set(POST_TRAINING)


@pytest.mark.parametrize(
    "recipe,options",
    [
        ("rtn", ["--bits", "3", "--group_size", "32"]),
        ("gptq", ["--group_size", "32", "--symmetric", "true"]),
        ("smoothquant", ["--level", "o3", "--alpha", "auto"]),
        ("efficient_qat", ["--block_steps", "2"]),
    ],
)
def test_quantized_evaluated_packed_and_generated_from(
    recipe: str, options: list[str], float_run: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, packed = tmp_path / "q", tmp_path / "q.safetensors"
    text = [] if recipe == "rtn" else ["--calibration", str(stories), "--calibration_rows", "8"]
    assert main(["quantize", str(float_run), "--recipe", recipe, "--out", str(out), *options, *text]) == 0
    assert POST_TRAINING[recipe].__name__ in capsys.readouterr().out
    assert "format ternary2: is for ternary" in error_of(
        capsys, "pack", str(out), "--out", str(packed), "--format", "ternary2"
    )
    assert main(["pack", str(out), "--out", str(packed)]) == 0
    assert "bit codes" in capsys.readouterr().out
    texts = []
    for model in (out, packed):
        assert main(["generate", str(model), "--prompt", "The small", "--max_new_tokens", "12"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["evaluate", str(packed), "--data.path", str(stories), "--limit", "4", "--json"]) == 0
    loss = json.loads(capsys.readouterr().out)["loss"]
    assert 0 < loss < 5.7  # below uniform over 300 tokens
    a, b = load_checkpoint(out)[0], load_packed(packed)[0]
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(a(ids), b(ids))
    origin = json.loads((out / "origin.json").read_text())
    assert origin["parent"] == str(float_run) and origin["peak_memory_mb"] > 0
    assert ("calibration_tokens" in origin) == bool(text)
    assert read_checkpoint(out)["bitnet"]["origin"]["parent_sha256"] == origin["parent_sha256"]


@pytest.mark.parametrize("rows,blocks", [(4, 0), (8, 2)])
def test_errors_of_blocks_are_those_of_batches_held_out(
    rows: int, blocks: int, float_run: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four rows are one batch, of which nothing is held out: nothing is said, and origin.json stays JSON."""
    out = tmp_path / "q"
    command = ["quantize", str(float_run), "--recipe", "efficient_qat", "--block_steps", "1", "--out", str(out)]
    assert main([*command, "--calibration", str(stories), "--calibration_rows", str(rows)]) == 0
    assert capsys.readouterr().out.count("held-out error") == blocks
    origin = json.loads((out / "origin.json").read_text(), parse_constant=pytest.fail)
    assert len(origin["block_errors"]) == blocks


@pytest.mark.parametrize(
    "options,named",
    [
        (["--recipe", "rtn", "--bits", "9"], "bits = 9"),
        (["--recipe", "rtn", "--bit", "4"], "unknown key 'bit'. Did you mean 'bits'?"),
        (["--recipe", "rtn", "--group_size", "24"], "24 does not divide the 64 inputs"),
        (["--recipe", "gptq"], "give it text with --calibration"),
        (["--recipe", "gptq", "--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--recipe", "rtn", "--calibration", "x.txt"], "leave it out"),
        (["--recipe", "rtn", "--calibration_rows", "16"], "--calibration_rows: rtn looks at weights only"),
        (["--recipe", "rtn", "--batch_size", "2"], "--batch_size: rtn looks at weights only"),
        (["--recipe", "qat"], "bitnet fit --config posttrain/qat"),
        (["--recipe", "awk"], "invalid choice"),
        (
            ["--recipe", "gptq", "--calibration", "x.txt", "--calibration_len", "0"],
            "calibration_len = 0: must be at least 2",
        ),
        (["--recipe", "smoothquant", "--calibration", "x.txt", "--calibration_len", "1"], "must be at least 2"),
        (["--recipe", "smoothquant", "--alpha", "7", "--calibration", "x.txt"], "alpha = 7"),
    ],
)
def test_bad_wishes_are_one_line_and_leave_nothing(
    options: list[str], named: str, float_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in error_of(capsys, "quantize", str(float_run), "--out", str(tmp_path / "q"), *options)
    assert list(tmp_path.iterdir()) == []


def test_low_bit_parents_are_refused(
    finished_run: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "q")
    assert "low-bit model already" in error_of(capsys, "quantize", str(finished_run), "--recipe", "rtn", "--out", out)
    (tmp_path / "q").mkdir()
    assert "exists already" in error_of(capsys, "quantize", str(finished_run), "--recipe", "rtn", "--out", out)
    command = ["fit", "--config", "posttrain/qat", f"--data.path={stories}"]
    command += [f"--trainer.default_root_dir={tmp_path / 'r'}", "--trainer.max_steps=1"]
    for options, named in (
        ([f"--model.init_from={finished_run}"], "starts from a float one"),
        ([], "set model.init_from"),
        (["--model.recipe=RTN"], "nothing to train; use 'bitnet quantize'"),
    ):
        assert fit([*command, *options]) == 2
        assert named in capsys.readouterr().err
        assert not (tmp_path / "r").exists()


TRAINED = ("qat", "efficient_qat", "llm_qat", "peqa", "qlora", "loftq", "qa_lora", "distilled")


@pytest.mark.parametrize("name", TRAINED)
def test_posttrain_configs_run_and_resume(
    name: str, float_run: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes and tokenizer come from the parent; a stopped run goes on, and does not calibrate again."""
    options = ["--config", f"posttrain/{name}", f"--model.init_from={float_run}", f"--data.path={stories}"]
    options += ["--data.seq_len=32", "--data.batch_size=4", "--model.calibration_rows=8", "--trainer.accelerator=cpu"]
    options += ["--trainer.val_check_interval=2", "--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=1"]
    if name == "efficient_qat":
        options.append("--model.recipe.init_args.block_steps=2")
    folders = {}
    for run, steps in (("whole", [4]), ("halves", [2, 4])):
        folder = folders[run] = tmp_path / run
        for number, last in enumerate(steps):
            more = [f"--trainer.default_root_dir={folder}", f"--trainer.max_steps={last}"]
            more += ["--model.schedule.kind=constant", "--model.schedule.warmup_steps=0"]
            assert fit(["fit", *options, *more, *(["--ckpt_path=last"] if number else [])]) == 0
        assert read_checkpoint(folder)["global_step"] == 4
    states: list[dict[str, Any]] = [read_checkpoint(folder)["state_dict"] for folder in folders.values()]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    model, tokenizer = load_checkpoint(folders["whole"])
    assert tokenizer.to_str() == load_checkpoint(float_run)[1].to_str() and model.config.dim == 64
    assert len(quantized_layers(model)) == (0 if name == "distilled" else 14)
    capsys.readouterr()
    assert main(["evaluate", str(folders["whole"]), "--data.path", str(stories), "--limit", "2"]) == 0
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize("late", [0.0, 0.5])
def test_latent_weights_of_qat_stay_float32_where_the_rest_is_bf16(late, float_run, stories, tmp_path) -> None:
    """And dropout, no part of what the parent is, is what was asked for."""
    command = ["fit", "--config", "posttrain/qat", "--config", "overlays/bf16_true", f"--data.path={stories}"]
    command += [f"--model.init_from={float_run}", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=2"]
    command += ["--data.seq_len=32", "--data.batch_size=4", "--trainer.accelerator=cpu", "--model.config.dropout=0.25"]
    command += ["--model.recipe.activation_bits=8", f"--model.recipe.act_from={late}"]
    assert fit(command) == 0
    content = read_checkpoint(tmp_path)
    assert content["bitnet"]["config"]["dropout"] == 0.25
    dtypes = {name: t.dtype for name, t in content["state_dict"].items() if t.is_floating_point() and t.ndim == 2}
    latent = {dtype for name, dtype in dtypes.items() if name.split(".")[-2] in ("wq", "wo", "w1", "w2")}
    assert latent == {torch.float32}
    assert dtypes["model.tok_embeddings.weight"] == torch.bfloat16
    assert load_checkpoint(tmp_path)[0](torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()


def test_conversations_end_with_the_token_of_the_parent(float_run, tmp_path, capsys) -> None:
    """Known only when the parent has been read."""
    content = torch.load(float_run / "checkpoints" / "last.ckpt", weights_only=True)
    parent = tmp_path / "parent"
    (parent / "checkpoints").mkdir(parents=True)
    content["bitnet"]["tokenizer"] = content["bitnet"]["tokenizer"].replace("<|endoftext|>", "</s>")
    torch.save(content, parent / "checkpoints" / "last.ckpt")
    (parent / "tokenizer.json").write_text(content["bitnet"]["tokenizer"])
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]
    (tmp_path / "talks.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 50))
    command = ["fit", "--config", "posttrain/qat", f"--data.path={tmp_path / 'talks.jsonl'}"]
    command += [
        f"--model.init_from={parent}",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--trainer.max_steps=1",
    ]
    command += ["--data.seq_len=32", "--data.batch_size=2", "--trainer.accelerator=cpu", "--data.chat_template=plain"]
    assert fit(command) == 0
    store = TokenStore(Path(json.loads((tmp_path / "run" / "summary.json").read_text())["data"]["folder"]))
    ids = store.ids("train-0") % UNSAID
    end = store.tokenizer.token_to_id("</s>")
    assert end == store.eos_id and (ids == end).sum() == 2 * store.totals("train-0").documents


def test_synthesized_text_trains_without_the_data(
    float_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    assert main(["synthesize", str(float_run), "--out", str(own), "--sequences", "60", "--length", "32"]) == 0
    store = TokenStore(own)
    ids = store.ids("train-0")
    assert store.totals("train-0").documents == 57 and store.totals("val").documents == 3
    assert int((ids == store.eos_id).sum()) == 57 and int(ids.max()) < store.vocab_size
    assert store.tokenizer.to_str() == load_checkpoint(float_run)[1].to_str()
    command = ["fit", "--config", "posttrain/llm_qat", f"--model.init_from={float_run}", f"--data.path={own}"]
    command += ["--data.seq_len=32", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    command += [f"--trainer.default_root_dir={tmp_path / 'student'}", "--trainer.accelerator=cpu"]
    command += ["--trainer.log_every_n_steps=1"]
    assert fit(command) == 0
    assert "exists already" in error_of(capsys, "synthesize", str(float_run), "--out", str(own))
    assert "sequences" in error_of(
        capsys, "synthesize", str(float_run), "--out", str(tmp_path / "x"), "--sequences", "0"
    )
    assert not (tmp_path / "x").exists()
    named = error_of(capsys, "synthesize", str(float_run), "--out", str(tmp_path / "x"), "--length", "0")
    assert "length = 0: must be between 2" in named


def calibrated_on(parent: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[str]:
    """Text of the eight rows, three at a time, that ``fit`` shows a recipe: of three times as many of one token as of
    another, and of a source without a whole row."""
    sources = {"first": ["~" * 500] * 30, "second": ["%" * 500] * 10, "third": ["short", "text"]}
    for name, texts in sources.items():
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(texts))
    seen: list[torch.Tensor] = []

    def look(self: Any, chain: Any, progress: Any) -> list[str]:
        seen.extend(chain.batches)
        raise UserError("seen enough")

    monkeypatch.setattr(EfficientQAT, "train_blocks", look)
    paths = ",".join(f'"{folder / name}.txt"' for name in sources)
    command = ["fit", "--config", "posttrain/efficient_qat", f"--model.init_from={parent}", f"--data.path=[{paths}]"]
    command += ["--data.seq_len=32", "--data.batch_size=3", "--model.calibration_rows=8", "--trainer.accelerator=cpu"]
    command += [f"--trainer.default_root_dir={folder / 'r'}", "--data.val_fraction=0.1", "--trainer.max_steps=1"]
    assert fit([*command, *options]) == 2
    assert [len(batch) for batch in seen] == [3, 3, 2]
    tokenizer = load_checkpoint(parent)[1]
    return [tokenizer.decode(row.tolist()) for row in torch.cat(seen)]


@pytest.mark.parametrize(
    "options,from_first", [((), 6), (("--data.weights=[0,1,0]",), 0), (("--data.weights=[1,3,0]",), 2)]
)
def test_calibration_is_of_every_source_by_its_share(
    options: tuple[str, ...], from_first: int, float_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = calibrated_on(float_run, tmp_path, monkeypatch, *options)
    assert sum("~" in row for row in rows) == from_first and sum("%" in row for row in rows) == 8 - from_first


def test_calibration_of_streams_is_of_their_sample(
    float_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is one text, however many weights there are."""
    paths = f'--data.path=["{tmp_path}/first.txt","{tmp_path}/second.txt"]'
    stream = ("--data.streaming=true", "--data.stream_val_bytes=600", "--data.weights=[1,1]")
    rows = calibrated_on(float_run, tmp_path, monkeypatch, paths, *stream)
    assert all("~" in row or "%" in row for row in rows)


def test_calibration_is_not_thinned_out_by_dropout(
    float_run: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float run has dropout 0.1: off while a recipe looks at activations, on while it trains."""
    seen: list[tuple[str, bool]] = []
    train_blocks, loss = EfficientQAT.train_blocks, EfficientQAT.loss

    def watched_blocks(self: Any, chain: Any, progress: Any) -> list[str]:
        seen.append(("calibration", any(m.training for m in chain.model.modules())))
        return train_blocks(self, chain, progress)

    def watched_loss(self: Any, model: Any, batch: Any) -> torch.Tensor:
        seen.append(("training", all(m.training for m in model.modules())))
        return loss(self, model, batch)

    monkeypatch.setattr(EfficientQAT, "train_blocks", watched_blocks)
    monkeypatch.setattr(EfficientQAT, "loss", watched_loss)
    command = ["fit", "--config", "posttrain/efficient_qat", f"--model.init_from={float_run}", f"--data.path={stories}"]
    command += ["--data.seq_len=32", "--data.batch_size=4", "--model.calibration_rows=8", "--trainer.max_steps=1"]
    command += ["--trainer.val_check_interval=1", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    command += ["--model.recipe.init_args.block_steps=1", f"--trainer.default_root_dir={tmp_path / 'r'}"]
    assert fit([*command, "--trainer.log_every_n_steps=1"]) == 0
    assert load_checkpoint(float_run)[0].config.dropout == 0.1
    assert seen == [("calibration", False), ("training", True)]
