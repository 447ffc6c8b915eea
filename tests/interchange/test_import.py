"""Other programs' models as runs of ours: every form, shards, memory, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM

from bitnet.__main__ import main
from bitnet.checkpoint import load_checkpoint
from bitnet.data.tokenizer import begin_with
from bitnet.errors import UserError
from bitnet.inference.files import load_model
from bitnet.inference.packed_model import PackedTransformer
from bitnet.interchange import hf_export
from bitnet.interchange.gguf_export import write_gguf
from bitnet.interchange.hf_import import Folder, read_hf
from bitnet.interchange.importing import save_run
from bitnet.interchange.opened import Opened, open_model
from bitnet.interchange.parts import Matrix, float_state, matrices
from bitnet.quantizers import quantize_ternary_absmean

from .conftest import opened_model
from .test_hf_export import written

IDS = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(3))


def forward(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS)


@pytest.mark.parametrize("sub_norm", [True, False])
@pytest.mark.parametrize("form", ["bitlinear", "autobitlinear", "online", "dense"])
def test_every_form_comes_back(form, sub_norm, tmp_path) -> None:
    opened = opened_model(sub_norm=sub_norm, activation="relu2", tie_embeddings=False, rope_theta=500_000.0)
    back = read_hf(written(opened, tmp_path / "hf", form))
    assert back.model.config == opened.model.config
    low_bit = form != "dense"
    assert back.recipe["weight"] == ("ternary" if low_bit else "none")
    assert isinstance(back.model, PackedTransformer) == (form in ("bitlinear", "autobitlinear"))
    for mine, theirs in zip(matrices(opened.model), matrices(back.model), strict=True):
        if low_bit:
            assert torch.equal(mine.levels, theirs.levels)
        else:
            assert torch.equal(mine.dense(), theirs.weight)
    if form in ("bitlinear", "online"):  # autobitlinear stores the scale the other way round: rounded twice
        assert torch.equal(forward(back.model), forward(opened.model))


@pytest.mark.parametrize("kind", ["llama", "bitnet"])
def test_models_of_transformers_have_their_logits_here(kind, tmp_path) -> None:
    """A float model that transformers made and saved itself, with grouped heads and another rope."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "initializer_range": 0.1,
    }  # fmt: skip
    if kind == "llama":
        config = LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
        theirs = LlamaForCausalLM(config)
    else:
        theirs = BitNetForCausalLM(BitNetConfig(**sizes, tie_word_embeddings=True))
    theirs = theirs.eval()
    theirs.save_pretrained(tmp_path)
    opened_model().tokenizer.save(str(tmp_path / "tokenizer.json"))
    back = open_model(tmp_path)
    with torch.inference_mode():
        assert torch.equal(forward(back.model), theirs(IDS, use_cache=False).logits)
    assert back.model.config.tie_embeddings == (kind == "bitnet")


def sharded(folder: Path) -> None:
    """Split model.safetensors into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("form", ["bitlinear", "dense"])
def test_shards(form, tmp_path) -> None:
    opened = opened_model()
    folder = written(opened, tmp_path / "hf", form)
    whole = forward(open_model(folder).model)
    sharded(folder)
    assert torch.equal(forward(open_model(folder).model), whole)


PEAK = """
import sys
import torch
from pathlib import Path
from bitnet.interchange.hf_import import read_hf
from bitnet.interchange.importing import save_run
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
import tokenizers
before = peak()
run = Path(sys.argv[2]); run.mkdir()
save_run(read_hf(Path(sys.argv[1])), run, False)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("form", ["bitlinear", "dense"])
def test_an_import_takes_the_memory_of_the_file(form, tmp_path) -> None:
    opened = opened_model(dim=1024, ffn_dim=2816, n_layers=4, n_heads=16, n_kv_heads=16)
    folder = written(opened, tmp_path / "hf", form, "bfloat16")
    sharded(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < size + 64


def test_bfloat16_stays_on_disk_and_float32_computes(tmp_path) -> None:
    opened = opened_model(weight="none", act_bits="none", sub_norm=False)
    folder = written(opened, tmp_path / "hf", "dense", "bfloat16")
    assert main(["import", str(folder), "--out", str(tmp_path / "run"), "--check_tokens", "0"]) == 0
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert {tensor.dtype for tensor in content["state_dict"].values()} == {torch.bfloat16}
    model, _ = load_checkpoint(tmp_path / "run")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    rounded = {name: tensor.bfloat16().float() for name, tensor in opened.model.state_dict().items()}
    opened.model.load_state_dict(rounded)
    assert torch.equal(forward(model), forward(opened.model))


def test_a_packed_import_serves_every_command(trained, tmp_path, capsys) -> None:
    folder, run = tmp_path / "hf", tmp_path / "run"
    assert main(["export", str(trained), "--format", "hf", "--out", str(folder), "--check_tokens", "0"]) == 0
    assert "not done: --check_tokens 0" in capsys.readouterr().out
    assert main(["import", str(folder), "--out", str(run), "--check_tokens", "20"]) == 0
    assert "bound       equality: met" in capsys.readouterr().out
    assert sorted(p.name for p in run.iterdir()) == ["origin.json", "packed.safetensors", "tokenizer.json"]
    ids = torch.randint(0, 300, (1, 20))
    with torch.inference_mode():
        assert torch.equal(load_model(run)[0](ids), load_model(trained)[0](ids))
    texts = []
    for model in (trained, run, folder):
        assert main(["generate", str(model), "--prompt", "The", "--max_new_tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert main(["inspect", str(run), "--verify"]) == 0
    assert "every digest is right" in capsys.readouterr().out
    assert main(["pack", str(run), "--out", str(tmp_path / "small.safetensors"), "--format", "ternary_base3"]) == 0
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "again"), "--check_tokens", "0"]) == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert "## Origin" in (tmp_path / "again/README.md").read_text()


def test_trainable_latents_quantize_to_the_same_trits_and_scale(trained, tmp_path, run_fit, stories) -> None:
    """absmean of what is written is the stored scale, up to rounding: training goes on where the file left off."""
    opened = open_model(trained)
    folder = written(opened, tmp_path / "hf")
    assert main(["import", str(folder), "--out", str(tmp_path / "run"), "--trainable", "--check_tokens", "0"]) == 0
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for matrix in matrices(opened.model):
        q, inv_scale = quantize_ternary_absmean(state[f"model.{matrix.name}.weight"])
        assert torch.equal(q.to(torch.int8), matrix.levels)
        torch.testing.assert_close(inv_scale.reshape(1), matrix.inv_scale, rtol=1e-6, atol=0)
    options = [f"--model.init_from={tmp_path / 'run'}", f"--data.tokenizer={tmp_path / 'run/tokenizer.json'}"]
    sizes = ["--model.config.dim=256", "--model.config.ffn_dim=256", "--data.seq_len=64", "--trainer.max_steps=2"]
    run_fit(stories, tmp_path / "more", *options, *sizes)


def test_a_first_token_is_kept_by_both_formats(tmp_path) -> None:
    """What a tokenizer puts before every text, said in the tokenizer or left to transformers' settings."""
    opened = opened_model(sub_norm=False)
    begin_with(opened.tokenizer, "<|endoftext|>")
    ids = opened.tokenizer.encode("The dog").ids
    assert ids[0] == 0
    folder, file = written(opened, tmp_path / "hf"), tmp_path / "m.gguf"
    write_gguf(file, opened.model, opened.tokenizer, kind="f16", name="t", eos_id=0, chat_template=None)
    assert open_model(folder).tokenizer.encode("The dog").ids == ids
    assert open_model(file).tokenizer.encode("The dog").ids == ids
    plain = opened_model(sub_norm=False)
    folder = written(plain, tmp_path / "left")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    assert open_model(folder).tokenizer.encode("The dog").ids == ids


def test_all_zero_matrices_survive() -> None:
    opened = opened_model()
    with torch.no_grad():
        opened.model.layers[0].attention.wq.weight.zero_()
    from bitnet.inference.packing import pack

    state = float_state(pack(opened.model), Matrix.latent)
    assert not state["layers.0.attention.wq.weight"].any()


def change(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "gpt2"}, "this library has the graphs of bitnet and llama"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling = {'rope_type': 'yarn'"),
        ({"head_dim": 32}, "config.json: head_dim = 32"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide': must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: must be"),
        ({"num_hidden_layers": 3}, "num_hidden_layers = 3, but the tensors are of 2 layers"),
        ({"num_hidden_layers": 1}, "num_hidden_layers = 1, but the tensors"),
        ({"intermediate_size": 128}, "its config says"),
        ({"quantization_config": {"quant_method": "gptq"}}, "only 'bitnet' is read"),
        ({"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}}, "use_rms_norm"),
        ({"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["o_proj"]}}, "must be low-bit"),
        ({"vocab_size": None}, "has no vocab_size"),
        ({"vocab_size": "300"}, "vocab_size = '300': must be a whole number"),
        ({"num_key_value_heads": None}, "has no num_key_value_heads"),
        ({"quantization_config": None}, "has no quantization_config, but the tensors are packed"),
        ({"quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}}, "mode = online, but"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_this_library_cannot_compute_is_refused(values, words, tmp_path) -> None:
    folder = written(opened_model(), tmp_path / "hf")
    change(folder, **values)
    with pytest.raises(UserError, match=words):
        read_hf(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": 1},
        {"quantization_config": [1]},
        {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": 1}},
        {"model_type": []},
        {"num_hidden_layers": 1.5},
        {"vocab_size": 10**18},
        {"num_hidden_layers": 10**9},
    ],
    ids=str,
)
def test_senseless_values_are_one_line(values, tmp_path) -> None:
    folder = written(opened_model(), tmp_path / "hf")
    change(folder, **values)
    with pytest.raises(UserError) as caught:
        read_hf(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_pickled_weights_are_not_read(tmp_path) -> None:
    folder = written(opened_model(), tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights are not read; found: pytorch_model.bin"):
        read_hf(folder)


def test_an_index_cannot_point_elsewhere(tmp_path) -> None:
    folder = written(opened_model(), tmp_path / "hf")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names the file '../outside.safetensors'"):
        Folder(folder)


def test_an_import_that_computes_otherwise_is_not_kept(monkeypatch, tmp_path, capsys) -> None:
    from bitnet.interchange import hf_import

    folder = written(opened_model(), tmp_path / "hf")
    monkeypatch.setattr(hf_import, "unpack_rows", lambda packed: -hf_export.unpack_rows(packed))
    assert main(["import", str(folder), "--out", str(tmp_path / "run"), "--check_tokens", "10"]) == 2
    said = capsys.readouterr()
    assert "bound       equality: missed" in said.out and "computes another model" in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_refusals_of_the_command(tmp_path, capsys) -> None:
    assert main(["import", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "neither a GGUF file nor a Hugging Face folder" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "no.gguf"), "--out", str(tmp_path / "run")]) == 2
    assert "no.gguf: no such file or folder" in capsys.readouterr().err
    assert main(["import", str(tmp_path), "--out", str(tmp_path / "run"), "--check_tokens=-1"]) == 2
    assert "argument --check_tokens: '-1' must be 0 or more" in capsys.readouterr().err
    folder = written(opened_model(weight="none", act_bits="none"), tmp_path / "hf", "dense")
    assert main(["import", str(folder), "--out", str(tmp_path / "run"), "--trainable", "--check_tokens", "0"]) == 2
    assert "can be trained as they are" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_default_of_several_chat_templates(tmp_path) -> None:
    folder = written(opened_model(), tmp_path / "hf", "bitlinear")
    file = folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "<<{{ messages[0].content }}>>"}]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": named}))
    assert open_model(folder).chat_template == "<<{{ messages[0].content }}>>"


def test_a_run_keeps_template_and_origin(tmp_path) -> None:
    opened = opened_model()
    talkative = Opened(
        model=opened.model,
        tokenizer=opened.tokenizer,
        recipe=opened.recipe,
        chat_template="{{ messages[0].content }}",
        eos_token="<|endoftext|>",
        origin={"kind": "test"},
    )
    save_run(talkative, tmp_path, False)
    back = open_model(tmp_path)
    assert (back.chat_template, back.eos_token, back.origin) == (
        "{{ messages[0].content }}",
        "<|endoftext|>",
        {"kind": "test"},
    )
