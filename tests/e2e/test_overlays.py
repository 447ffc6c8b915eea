"""Precision, compilation and several processes: each overlay trains, and several processes train what one would."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from bitnet import load_checkpoint
from bitnet.checkpoint import read_checkpoint
from bitnet.inference.packing import pack

from ..conftest import tiny_options
from ..inference.test_packing import assert_same
from ..runs import run_python
from ..training.stopping import TimeIsUp


def test_bf16_keeps_float32_weights_and_an_exact_forward(stories, tmp_path, run_fit) -> None:
    run_fit(
        stories, tmp_path / "run", "--trainer.precision=bf16-mixed", "--trainer.max_steps=20", "--model.optim.lr=1e-2"
    )
    state = read_checkpoint(tmp_path / "run")["state_dict"]
    assert {t.dtype for t in state.values()} == {torch.float32}
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())["figures"]
    assert figures["val/loss"] < 5.2
    model, _ = load_checkpoint(tmp_path / "run")
    assert_same(model, pack(model), ((1, 9), (2, 17)))


def test_masked_documents_and_late_four_bits_train(stories, tmp_path, run_fit) -> None:
    run_fit(stories, tmp_path / "run", "--data.mask_documents=true", "--model.recipe.act4_from=0.5")
    model, _ = load_checkpoint(tmp_path / "run")
    assert model.layers[0].attention.wq.act_bits == 4 and model.layers[0].attention.wo.act_bits == 8


def test_recomputed_blocks_train_the_same_bits(stories, tmp_path, run_fit) -> None:
    """Dropout included; only the memory differs."""
    run_fit(stories, tmp_path / "kept")
    run_fit(stories, tmp_path / "recomputed", "--config", "overlays/checkpointing")
    kept, recomputed = (read_checkpoint(tmp_path / n)["state_dict"] for n in ("kept", "recomputed"))
    assert all(torch.equal(recomputed[name], tensor) for name, tensor in kept.items())


def test_chunked_loss_trains_like_the_whole_one(stories, tmp_path, run_fit) -> None:
    """bf16 products, and a window of two micro-batches; validation counts in chunks too."""
    options = ("--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2")
    figures = []
    for chunk in ("null", "50"):
        run_fit(stories, tmp_path / chunk, f"--model.loss_chunk={chunk}", *options)
        figures.append(json.loads((tmp_path / chunk / "summary.json").read_text())["figures"])
    assert figures[1]["val/loss"] == pytest.approx(figures[0]["val/loss"], abs=0.01)


def test_a_chunk_of_no_tokens_is_refused_in_one_line(stories, tmp_path, capsys) -> None:
    from bitnet.training.cli import main as fit

    assert fit([*tiny_options(stories, tmp_path / "run"), "--model.loss_chunk=0"]) == 2
    assert "loss_chunk = 0: must be 1 or more, or null." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_muon_overlay_trains(stories, tmp_path, run_fit) -> None:
    run_fit(stories, tmp_path / "run", "--config", "overlays/muon", "--trainer.max_steps=20", "--model.optim.lr=1e-2")
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())["figures"]
    assert figures["val/loss"] < 5.2


def test_parts_work_with_a_plain_trainer(stories, tmp_path) -> None:
    """Without our command line: Lightning's own Trainer, its own checkpoint, our load_checkpoint."""
    import lightning

    from bitnet import BitNet, LitBitNet, ModelConfig, TokenDataModule

    options = {"logger": False, "accelerator": "cpu", "default_root_dir": tmp_path, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=3, callbacks=[TimeIsUp(1)], **options)
    config = ModelConfig(dim=32, n_layers=1, n_heads=2, ffn_dim=48, max_seq_len=32)
    module = LitBitNet(config, BitNet(weight="binary"))
    data = TokenDataModule(str(stories), vocab_size=300, seq_len=32, batch_size=2)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    model, tokenizer = load_checkpoint(tmp_path / "a.ckpt")
    ids = torch.tensor([tokenizer.encode("The small dog").ids])
    with torch.no_grad():
        assert torch.equal(model(ids), module.transformer.eval()(ids))
    assert trainer.global_step == 2
    again = lightning.Trainer(max_steps=2, **options | {"default_root_dir": tmp_path / "again"})
    again.fit(module.train(), datamodule=data)  # that a run has ended does not end the next
    assert again.global_step == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_train_like_eager_ones(stories, tmp_path) -> None:
    losses = []
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        options = [f"--model.compile={compiled}", "--model.config.dropout=0", "--trainer.max_steps=10"]
        options += ["--model.recipe.quantize_from=0.2", "--model.recipe.quantizer_warmup=0.5"]
        command([*tiny_options(stories, folder), *options], TORCHDYNAMO_DISABLE="0")
        losses.append(json.loads((folder / "summary.json").read_text())["figures"]["val/loss"])
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def test_the_sample_text_is_not_compiled(monkeypatch) -> None:
    """Each layer of its cache would be a form of its own: more than the compiler takes before it gives up."""
    from types import SimpleNamespace as Fake

    from bitnet import BitNet, ModelConfig, Transformer
    from bitnet.training.callbacks import SampleText

    counter = CompileCounter()
    model = Transformer(ModelConfig(vocab_size=40, dim=32, n_layers=4, n_heads=2, ffn_dim=48))
    BitNet().prepare(model)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    torch._dynamo.reset()
    for block in model.layers:
        block.compile(backend=counter)
    words: list[list[int]] = []
    tokens = Fake(ids=lambda part: [1, 2, 3, 4, 5, 6, 7, 8], eos_id=None)
    data = Fake(tokenizer=Fake(decode=lambda ids: words.append(ids) or ""), tokens=tokens)
    trainer = Fake(is_global_zero=True, sanity_checking=False, world_size=1, progress_bar_callback=None, logger=None)
    module = Fake(data=data, config=model.config, transformer=model.eval(), compile_blocks=True)
    SampleText(max_new_tokens=5).on_validation_end(trainer, module)
    assert len(words[0]) == 13 and counter.frame_count == 0
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert counter.frame_count > 0


def command(arguments: list[str], **environment: str) -> str:
    """What train.py prints in a process of its own, as a user would call it."""
    return run_python("train.py", *arguments, **environment).stdout


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 0.4], ids=["low bits throughout", "low bits blended in"])
@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
def test_two_processes_train_what_one_would(stories, tmp_path: Path, overlay, late) -> None:
    """Two ranks of 2 rows see the rows of one process of 4; only the order of float sums differs."""
    same = ["--model.config.dropout=0", "--trainer.max_steps=6", "--trainer.val_check_interval=6"]
    same += [f"--model.recipe.quantize_from={late}", f"--model.recipe.quantizer_warmup={late}"]
    command([*tiny_options(stories, tmp_path / "one"), *same])
    two = ["--config", f"overlays/{overlay}", "--trainer.devices=2", "--data.batch_size=2"]
    command([*tiny_options(stories, tmp_path / "two"), *same, *two])
    one, other = (read_checkpoint(tmp_path / n)["state_dict"] for n in ("one", "two"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=2e-4)
    figures = [json.loads((tmp_path / n / "summary.json").read_text())["figures"] for n in ("one", "two")]
    assert figures[1]["val/loss"] == pytest.approx(figures[0]["val/loss"], abs=2e-3)


@pytest.mark.parametrize("late", [0, 0.3], ids=["low bits throughout", "low bits blended in"])
def test_bf16_true_keeps_float32_latent_weights(stories, tmp_path, run_fit, late) -> None:
    """Everything else is bf16, also the default dtype of new tensors, which no kernel may rely on."""
    options = ["--config", "overlays/bf16_true", "--trainer.max_steps=30", "--model.optim.lr=1e-2"]
    options += [f"--model.recipe.quantize_from={late}", f"--model.recipe.quantizer_warmup={late}"]
    run_fit(stories, tmp_path / "run", *options)
    content = read_checkpoint(tmp_path / "run")
    for name, tensor in content["state_dict"].items():
        latent = name.endswith(
            (".wq.weight", ".wk.weight", ".wv.weight", ".wo.weight", "w1.weight", "w2.weight", "w3.weight")
        )
        assert tensor.dtype == (torch.float32 if latent else torch.bfloat16), name
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())["figures"]
    assert figures["val/loss"] < 5.2
    model, _ = load_checkpoint(tmp_path / "run")
    assert_same(model, pack(model), ((1, 9), (2, 17)))
