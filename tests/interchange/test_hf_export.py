"""Folders that transformers reads: equal logits, and every known trap caught when it is set again."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.bitnet import pack_weights, unpack_weights

from bitnet import BitNet, Transformer
from bitnet.chat_template import PLAIN_TEMPLATE
from bitnet.errors import UserError
from bitnet.generation import Sampling, generate_tokens
from bitnet.inference.files import save_packed
from bitnet.inference.packing import pack
from bitnet.interchange import check, hf_export
from bitnet.interchange.check import EXACT, LAST_BITS, SAME_GRAPH, bound_of_hf, check_hf
from bitnet.interchange.exporting import export_hf
from bitnet.interchange.hf_export import check_form, pack_rows, unpack_rows, write_hf
from bitnet.interchange.opened import Opened, open_model
from bitnet.interchange.parts import matrices, without_activation_quantization
from bitnet.tensor_file import TensorFile

from .conftest import opened_model


def written(opened: Opened, folder: Path, form: str = "bitlinear", dtype: str = "float32") -> Path:
    folder.mkdir(exist_ok=True)
    write_hf(
        folder,
        opened.model,
        opened.tokenizer,
        form=form,
        dtype=dtype,
        eos_id=opened.eos_id,
        chat_template=opened.chat_template,
    )
    return folder


def their_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def test_rows_are_packed_as_transformers_packs_them() -> None:
    levels = torch.randint(-1, 2, (24, 10), dtype=torch.int8)
    assert torch.equal(pack_rows(levels), pack_weights(levels.clone()))
    assert torch.equal(unpack_rows(pack_rows(levels)), levels)
    assert torch.equal(unpack_weights(pack_rows(levels), torch.float32).to(torch.int8), levels)
    with pytest.raises(ValueError, match="no trit"):
        unpack_rows(torch.full((1, 1), 0b11, dtype=torch.uint8))


GRAPHS = [
    {"sub_norm": sub_norm, "activation": activation, "tie_embeddings": tied}
    for sub_norm in (True, False)
    for activation in ("silu", "relu2")
    for tied in (True, False)
]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: "-".join(map(str, g.values())))
@pytest.mark.parametrize("weight", ["ternary", "binary"])
def test_packed_logits_are_equal(graph, weight, tmp_path) -> None:
    """The training forward, the packed model and transformers: one set of bits."""
    opened = opened_model(weight=weight, rope_theta=500_000.0, **graph)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, packed = opened.model(ids), pack(opened.model)(ids)
    theirs = their_logits(written(opened, tmp_path / "hf"), ids)
    assert torch.equal(ours, packed)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scale", ["absmedian", "rms", "twn"])
def test_other_scales_are_equal_too(scale, tmp_path) -> None:
    opened = opened_model(scale=scale)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = opened.model(ids)
    assert torch.equal(ours, their_logits(written(opened, tmp_path / "hf"), ids))


def test_a_packed_model_exports_the_same_file(trained, trained_model, tmp_path) -> None:
    one = written(trained_model, tmp_path / "one")
    again = Opened(model=pack(trained_model.model), tokenizer=trained_model.tokenizer)
    two = written(again, tmp_path / "two")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_transformers_generates_the_same_text(trained_model, tmp_path) -> None:
    folder = written(trained_model, tmp_path / "hf")
    prompt = trained_model.tokenizer.encode("The small dog").ids
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([prompt])
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, eos_token_id=None
    )
    ours = list(generate_tokens(trained_model.model, prompt, 30, Sampling(temperature=0)))
    assert theirs[0, len(prompt) :].tolist() == ours
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("The small dog")["input_ids"] == prompt
    assert tokenizer.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("form", ["autobitlinear", "online", "dense"])
@pytest.mark.usefixtures("transformers_here")
def test_other_forms_meet_their_bounds(form, trained_model, tmp_path) -> None:
    bound = bound_of_hf(form, "float32")
    assert bound is (SAME_GRAPH if form == "dense" else LAST_BITS)
    report = check_hf(trained_model, written(trained_model, tmp_path / "hf", form), bound, 256)
    assert report.problems == []
    assert report.comparison is not None and report.comparison.tokens == 256


def test_dense_is_the_graph_without_activation_quantization(trained_model, tmp_path) -> None:
    ids = torch.tensor([trained_model.tokenizer.encode("A girl named Ann found a red ball.").ids])
    theirs = their_logits(written(trained_model, tmp_path / "hf", "dense"), ids)
    with torch.inference_mode():
        plain = without_activation_quantization(trained_model.model)(ids)
        served = trained_model.model(ids)
    torch.testing.assert_close(theirs, plain, rtol=0, atol=1e-5)
    assert not torch.equal(theirs, served)


@pytest.mark.usefixtures("transformers_here")
def test_four_bit_activations_can_be_exported_dense(tmp_path) -> None:
    opened = opened_model(act_bits=4)
    assert check_form(opened.model, "dense", "float32") == "dense"
    assert (
        check_hf(opened, written(opened, tmp_path / "hf", "dense"), bound_of_hf("dense", "float32"), 64).problems == []
    )


@pytest.mark.parametrize("scale_per", ["row", 64])
def test_several_scales_of_a_matrix_can_be_exported_dense(scale_per, tmp_path) -> None:
    """Latent, packed and transformers' dense model against the layers themselves with their activations in float."""
    opened = opened_model(act_bits="none", scale_per=scale_per)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = opened.model(ids)
    packed = Opened(model=pack(opened.model), tokenizer=opened.tokenizer)
    for number, form in enumerate((opened, packed)):
        theirs = their_logits(written(form, tmp_path / str(number), "dense"), ids)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        with pytest.raises(
            UserError, match=r"layers\.0\.attention\.wq has a scale for each .*--form dense and --type f16"
        ):
            check_form(form.model, "bitlinear", "float32")


@pytest.mark.usefixtures("transformers_here")
def test_bfloat16_is_written_in_one_dtype(trained_model, tmp_path) -> None:
    folder = written(trained_model, tmp_path / "hf", dtype="bfloat16")
    dtypes = {entry.dtype for entry in TensorFile(folder / "model.safetensors").entries.values()}
    assert dtypes == {torch.uint8, torch.bfloat16}
    assert check_hf(trained_model, folder, bound_of_hf("bitlinear", "bfloat16"), 64).problems == []
    back = open_model(folder)  # the trits are those of the float32 latent weights
    for mine, theirs in zip(matrices(trained_model.model), matrices(back.model), strict=True):
        assert torch.equal(mine.levels, theirs.levels)


def test_the_chat_template_goes_along(tmp_path) -> None:
    opened = dataclasses.replace(opened_model(), chat_template=PLAIN_TEMPLATE)
    folder = written(opened, tmp_path / "hf")
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    assert theirs == "User: Who?\nAssistant: Ann.<|endoftext|>\n"
    assert open_model(folder).chat_template == PLAIN_TEMPLATE


def test_files_say_what_both_versions_read(trained_model, tmp_path) -> None:
    folder = written(trained_model, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["quantization_config"]["linear_class"] == "bitlinear"
    assert config["quantization_config"]["modules_to_not_convert"] is None
    assert config["tie_word_embeddings"] is True
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    entries = TensorFile(folder / "model.safetensors").entries
    assert {e.shape for n, e in entries.items() if n.endswith("weight_scale")} == {(1,)}
    assert not any("inv_freq" in name or name.startswith("lm_head") for name in entries)


def edit(file: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return do


def forget_rope(config: dict[str, Any]) -> None:
    del config["rope_theta"], config["rope_parameters"]


TRAPS: dict[str, Callable[[Path], None]] = {
    "inverted scale": edit("config.json", lambda c: c["quantization_config"].update(linear_class="autobitlinear")),
    "no quantization": edit("config.json", lambda c: c.pop("quantization_config")),
    "head converted": edit("config.json", lambda c: c["quantization_config"].update(modules_to_not_convert=[])),
    "untied": edit("config.json", lambda c: c.update(tie_word_embeddings=False)),
    "no rope": edit("config.json", forget_rope),
    "other dtype": edit("config.json", lambda c: c.update(dtype="bfloat16", torch_dtype="bfloat16")),
    "other activation": edit("config.json", lambda c: c.update(hidden_act="relu2")),
    "other tokens": edit("tokenizer.json", lambda c: c["pre_tokenizer"].update(add_prefix_space=True)),
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.usefixtures("transformers_here")
@pytest.mark.filterwarnings("ignore")
def test_traps_are_caught(trap, tmp_path) -> None:
    opened = opened_model(rope_theta=500.0)
    folder = written(opened, tmp_path / "hf")
    assert check_hf(opened, folder, EXACT, 64).problems == []
    TRAPS[trap](folder)
    try:
        report = check_hf(opened, folder, EXACT, 64)
    except UserError:
        return  # transformers refused it
    assert report.problems


@pytest.mark.usefixtures("transformers_here")
def test_a_scale_computed_again_is_caught(monkeypatch, trained_model, tmp_path) -> None:
    """absmean of a ternary matrix is its scale times the share of non-zeros."""
    real = hf_export._tensors_of

    def again(matrix: Any, form: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tensors = real(matrix, form, dtype)
        name = next(name for name in tensors if name.endswith("weight_scale"))
        tensors[name] = 1 / matrix.dense().abs().mean().reshape(1)
        return tensors

    monkeypatch.setattr(hf_export, "_tensors_of", again)
    report = check_hf(trained_model, written(trained_model, tmp_path / "hf"), EXACT, 64)
    assert any("difference" in problem for problem in report.problems)


@pytest.mark.usefixtures("transformers_here")
def test_rows_interleaved_as_columns_are_caught(monkeypatch, trained_model, tmp_path) -> None:
    def wrong(levels: torch.Tensor) -> torch.Tensor:
        codes = (levels + 1).to(torch.uint8).view(-1, 4, levels.shape[1])
        return codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6

    monkeypatch.setattr(hf_export, "pack_rows", wrong)
    assert check_hf(trained_model, written(trained_model, tmp_path / "hf"), EXACT, 64).problems


def test_what_cannot_be_held_is_refused(tmp_path) -> None:
    for options, form, dtype, words in (
        ({"act_bits": 4}, "bitlinear", "float32", "4-bit activations"),
        ({"weight": "binary"}, "online", "float32", "binary latent weights"),
        ({}, "online", "bfloat16", "moves trits"),
        ({"ffn_dim": 258}, "bitlinear", "float32", "packed rows come in fours"),
    ):
        with pytest.raises(UserError, match=words):
            check_form(opened_model(**options).model, form, dtype)
    packed = pack(opened_model().model)
    with pytest.raises(UserError, match="a packed model has none"):
        check_form(packed, "online", "float32")
    medians = Transformer(opened_model().model.config)
    BitNet(scale="absmedian").prepare(medians)
    with pytest.raises(UserError, match=r"layers.0.attention.wq has other scales than the mean magnitude"):
        check_form(medians, "online", "float32")
    assert check_form(medians, "bitlinear", "float32") == "bitlinear"
    assert check_form(opened_model(weight="none", act_bits="none").model, "bitlinear", "float32") == "dense"


def test_a_failed_check_leaves_nothing(monkeypatch, tmp_path, capsys) -> None:
    """The whole way: transformers in a process of its own, a wrong file, exit 2, no folder."""
    from bitnet.__main__ import main

    opened = opened_model()
    save_packed(pack(opened.model), opened.tokenizer, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        hf_export, "pack_rows", lambda levels: torch.zeros(levels.shape[0] // 4, levels.shape[1]).byte()
    )
    code = main(["export", str(tmp_path / "model.safetensors"), "--format", "hf", "--out", str(tmp_path / "hf")])
    said = capsys.readouterr()
    assert code == 2
    assert "bound       equality: missed" in said.out
    assert said.err.startswith("error: ") and "computes another model" in said.err and said.err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


def test_the_command_writes_a_folder_with_a_card(trained, tmp_path, capsys) -> None:
    from bitnet.__main__ import main

    out = tmp_path / "hf"
    assert main(["export", str(trained), "--format", "hf", "--out", str(out), "--check_tokens", "16"]) == 0
    said = capsys.readouterr().out
    assert "max 0, mean 0" in said and "bound       equality: met" in said
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for words in (
        "TORCHDYNAMO_DISABLE",
        "ternary weights (1.58 bits)",
        "![Bits per byte",
        "bits per parameter",
        "80 in",
        "| begun with | random weights |\n| seed | 0 |",
        'from_pretrained("hf")',
    ):
        assert words in card
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["export", str(trained), "--format", "hf", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_without_transformers_the_report_says_so(monkeypatch, trained_model, tmp_path) -> None:
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    report = check_hf(trained_model, tmp_path, EXACT, 64)
    assert report.problems == [] and "not installed" in report.lines()[0]


@pytest.mark.slow
def test_transformers_4_gives_the_same_bits(trained, tmp_path) -> None:
    """The oldest version that is promised, installed beside this one."""
    packages = tmp_path / "packages"
    wanted = ["transformers==4.57.6", "huggingface_hub<1", "tokenizers>=0.22,<=0.23.0"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *wanted]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip("transformers 4.57.6 cannot be installed here")
    sources = {"trained": trained}
    for sub_norm in (True, False):
        for activation in ("silu", "relu2"):
            opened = opened_model(sub_norm=sub_norm, activation=activation)
            sources[f"{sub_norm}-{activation}"] = tmp_path / f"{sub_norm}-{activation}.safetensors"
            save_packed(pack(opened.model), opened.tokenizer, sources[f"{sub_norm}-{activation}"])
    for name, source in sources.items():
        for form, lines in (("bitlinear", "max 0, mean 0"), ("autobitlinear", "argmax >= 99%: met")):
            if form == "autobitlinear" and name != "trained":
                continue
            command = [sys.executable, "-m", "bitnet", "export", str(source), "--format", "hf", "--form", form]
            done = subprocess.run(
                [*command, "--out", str(tmp_path / f"{name}-{form}")],
                env={**os.environ, "PYTHONPATH": str(packages)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            assert "transformers 4.57.6" in done.stdout and lines in done.stdout


def test_opened_folder_has_the_same_forward(trained_model, tmp_path) -> None:
    folder = written(trained_model, tmp_path / "hf")
    ids = torch.randint(0, trained_model.model.config.vocab_size, (1, 32))
    with torch.inference_mode():
        assert torch.equal(open_model(folder).model(ids), trained_model.model(ids))


def test_export_hf_is_whole_or_absent(monkeypatch, trained_model, tmp_path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bitnet.interchange.exporting.write_card", fail)
    options = {"name": "hf", "source": tmp_path, "form": "bitlinear", "dtype": "float32", "check_tokens": 0}
    with pytest.raises(UserError, match="No space left"):
        export_hf(trained_model, tmp_path / "hf", **options)
    assert list(tmp_path.iterdir()) == []
