"""Checkpoints: what is loaded is what was trained; what is damaged or foreign is refused; nothing in a file runs."""

import errno
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from bitnet import load_checkpoint
from bitnet.checkpoint import find_checkpoint, read_checkpoint, weights_digest
from bitnet.errors import UserError, of_the_machine
from bitnet.layers import BitLinear
from bitnet.option_checks import check_folder
from bitnet.quantizers import quantize_int8_absmax, quantize_ternary_absmean
from bitnet.replacing import PARTIAL_SUFFIX
from bitnet.training.atomic import remove_partial_files, write_atomically
from bitnet_kernels import matmul_reference


def test_run_folder_and_file_give_the_same_model(finished_run) -> None:
    model, tokenizer = load_checkpoint(finished_run)
    other, _ = load_checkpoint(str(finished_run / "checkpoints" / "last.ckpt"))
    assert weights_digest(model.state_dict()) == weights_digest(other.state_dict())
    assert not model.training
    assert tokenizer.to_str() == (type(tokenizer).from_file(str(finished_run / "tokenizer.json"))).to_str()
    assert model.lm_head.weight is model.tok_embeddings.weight
    ids = torch.tensor([tokenizer.encode("The small dog").ids])
    with torch.no_grad():
        logits = model(ids)
    assert logits.shape == (1, ids.shape[1], tokenizer.get_vocab_size()) and logits.dtype == torch.float32


def test_trained_weights_are_exactly_three_values_and_the_forward_is_integer(finished_run) -> None:
    model, tokenizer = load_checkpoint(finished_run)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            module.register_forward_hook(lambda m, args, y, name=name: seen.update({name: (m, args[0], y)}))
    with torch.no_grad():
        model(torch.tensor([tokenizer.encode("A girl named Ann found a red ball").ids]))
    assert len(seen) == 14
    for name, (layer, x, y) in seen.items():
        q, inv_scale = layer.quantized_weight()
        assert q.unique().tolist() == [-1, 0, 1], name
        x_q, x_inv = quantize_int8_absmax(x)
        total = matmul_reference(x_q.to(torch.int8)[0], quantize_ternary_absmean(layer.weight)[0].to(torch.int8))
        assert torch.equal(y[0], total.float() / (x_inv[0] * inv_scale)), name


def test_weights_moved_during_training(finished_run, tmp_path, stories, run_fit) -> None:
    """A run whose trits never flip looks almost healthy; this one must have changed them."""
    run_fit(stories, tmp_path / "start", "--trainer.max_steps=1", "--model.optim.lr=1e-9")
    start, _ = load_checkpoint(tmp_path / "start")
    end, _ = load_checkpoint(finished_run)
    for name, module in end.named_modules():
        if isinstance(module, BitLinear):
            before = start.get_submodule(name).quantized_weight()[0]
            assert (module.quantized_weight()[0] != before).float().mean() > 0.02, name


@pytest.mark.parametrize("damage", ["truncated", "text", "other", "version"])
def test_damaged_and_foreign_files_are_refused(finished_run, tmp_path, damage) -> None:
    file = tmp_path / "bad.ckpt"
    content = find_checkpoint(finished_run).read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        file.write_text("hello")
    elif damage == "other":
        torch.save({"state_dict": {}}, file)
    else:
        changed = read_checkpoint(finished_run)
        changed["bitnet"]["format_version"] = 99
        torch.save(changed, file)
    with pytest.raises(UserError, match=r"bad\.ckpt") as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_code_in_a_checkpoint_does_not_run(tmp_path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    (tmp_path / "a.ckpt").write_bytes(pickle.dumps(Evil()))
    torch.save({"bitnet": Evil(), "state_dict": {}}, tmp_path / "b.ckpt")
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / name)
    assert not canary.exists()


def test_missing_runs_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no checkpoints/last\.ckpt"):
        load_checkpoint(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    file = tmp_path / "last.ckpt"
    write_atomically({"a": torch.ones(3)}, file)

    def full(content: object, handle) -> None:
        handle.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bitnet.training.atomic.torch.save", full)
    with pytest.raises(UserError, match=r"No space left on device.*the one from before is intact"):
        write_atomically({"a": torch.zeros(3)}, file)
    monkeypatch.undo()
    assert torch.load(file, weights_only=True)["a"].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_is_said_by_whatever_writes(tmp_path) -> None:
    """torch trips over what the system said, and says something else."""

    with pytest.raises(RuntimeError) as failed:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc]")  # noqa: B904
    assert str(of_the_machine(failed.value)) == "the disk is full (No space left on device)."
    denied = PermissionError(errno.EACCES, "Permission denied", "out/x.json")
    assert str(of_the_machine(denied)) == "out/x.json: not allowed (Permission denied)."
    assert of_the_machine(RuntimeError("a bug")) is None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        ended = pool.submit(os._exit, 1).exception()
    assert "the memory has run out" in str(of_the_machine(ended))


def test_a_file_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(UserError, match=f"--json {tmp_path}/x.json: {tmp_path} cannot be written to"):
        check_folder("--json", str(tmp_path / "x.json"))
    (tmp_path / "y.json").touch()
    check_folder("--json", str(tmp_path / "y.json"))  # a file that is there may be written all the same


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically({}, tmp_path / "file" / "last.ckpt")


def test_stale_partial_files_are_removed(tmp_path) -> None:
    (tmp_path / f".last.ckpt.1{PARTIAL_SUFFIX}").write_bytes(b"half")
    (tmp_path / "last.ckpt").write_bytes(b"whole")
    (tmp_path / f"last.ckpt{PARTIAL_SUFFIX}").mkdir()
    (tmp_path / f"last.ckpt{PARTIAL_SUFFIX}" / "meta.pt").write_bytes(b"half of a folder of parts")
    assert len(remove_partial_files(tmp_path)) == 2
    assert [p.name for p in Path(tmp_path).iterdir()] == ["last.ckpt"]
