"""What was trained is what is served: logits of the packed model equal the training forward, bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bitnet.checkpoint import load_checkpoint, weights_digest
from bitnet.errors import UserError
from bitnet.generation import Sampling, generate_batch
from bitnet.inference.files import load_packed, save_packed
from bitnet.inference.packed_linear import PackedLinear
from bitnet.inference.packing import pack
from bitnet.layers import BitLinear, low_bit_layers
from bitnet_kernels import FORMATS
from bitnet_kernels.cpu import native
from tests.inference.conftest import low_bit_model

GREEDY = Sampling(temperature=0.0)


@torch.inference_mode()
def assert_same(trained: nn.Module, packed: nn.Module, batches: tuple[tuple[int, int], ...]) -> None:
    """Full forward, prefill into a cache, and 12 cached tokens, all with torch.equal."""
    vocab = trained.config.vocab_size
    for B, T in batches:
        tokens = torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(B * 1000 + T))
        assert torch.equal(trained(tokens), packed(tokens)), (B, T)
        caches = [model.new_cache(B, T + 12) for model in (trained, packed)]
        a, b = (m(tokens, c) for m, c in zip((trained, packed), caches, strict=True))
        assert torch.equal(a, b)
        for _ in range(12):
            token = a[:, -1:].argmax(-1)
            a, b = (m(token, c) for m, c in zip((trained, packed), caches, strict=True))
            assert torch.equal(a, b)
        assert torch.equal(caches[0].keys, caches[1].keys)
        assert torch.equal(caches[0].values, caches[1].values)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weight", ["ternary", "binary"])
@pytest.mark.parametrize("sub_norm", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("sizes", [{}, {"dim": 64, "ffn_dim": 257, "n_kv_heads": 4}, {"dim": 40, "ffn_dim": 33}])
def test_logits_are_bit_equal(threads, weight, sub_norm, activation, sizes) -> None:
    model = low_bit_model(weight=weight, sub_norm=sub_norm, activation=activation, **sizes)
    torch.set_num_threads(threads)
    try:
        assert_same(model, pack(model), ((1, 1), (1, 17), (3, 40)))
    finally:
        torch.set_num_threads(1)


SCALES = [
    {"scale": "twn"}, {"scale_per": "row"}, {"scale_per": 64}, {"scale": "rms", "scale_per": 128},
    {"weight": "binary", "scale_per": "row"}, {"weight": "binary", "scale_per": 32},
    {"scale": "absmean"}, {"scale": "absmedian"}, {"scale": "rms"}, {"weight": "binary", "scale": "rms"},
]  # fmt: skip


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("options", SCALES, ids=lambda options: "-".join(map(str, options.values())))
def test_every_scale_is_served_as_trained(options, learned, tokenizer, tmp_path) -> None:
    """In training mode, in evaluation mode, packed, and packed in a file."""
    recipe = {**options, "learned_scale": learned}
    model = low_bit_model(dim=128, ffn_dim=384, weight=recipe.pop("weight", "ternary"), recipe=recipe)
    with torch.no_grad():
        for layer in low_bit_layers(model).values():
            if getattr(layer, "factor", None) is not None:
                layer.factor.mul_(torch.rand_like(layer.factor) + 0.5)
    packed = pack(model)
    assert_same(model, packed, ((1, 1), (1, 17), (3, 40)))
    tokens = torch.randint(97, (2, 17))
    with torch.inference_mode():
        expected = packed(tokens)
    assert torch.equal(model.train()(tokens).detach(), expected)
    save_packed(packed, tokenizer, tmp_path / "m.safetensors")
    assert_same(model.eval(), load_packed(tmp_path / "m.safetensors")[0], ((1, 9),))


@pytest.mark.parametrize("act_bits", [4, "none"])
def test_scales_of_groups_with_other_activations(act_bits) -> None:
    model = low_bit_model(dim=128, ffn_dim=384, act_bits=act_bits, recipe={"scale_per": 64})
    assert_same(model, pack(model), ((1, 9), (2, 20)))


@pytest.mark.parametrize("act_bits", [4, "none"])
def test_other_activation_widths(act_bits) -> None:
    model = low_bit_model(act_bits=act_bits)
    assert_same(model, pack(model), ((1, 9), (2, 20)))


def test_bf16_model() -> None:
    model = low_bit_model().bfloat16()
    packed = pack(model)
    tokens = torch.randint(97, (2, 20))
    with torch.inference_mode():
        assert torch.equal(model(tokens), packed(tokens))


@torch.inference_mode()
def logits_of(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """All at once, and the last twelve one by one from a cache."""
    cache = model.new_cache(*tokens.shape)
    one_by_one = [model(tokens[:, i : i + 1], cache) for i in range(tokens.shape[1] - 12, tokens.shape[1])]
    return [model(tokens), model(tokens[:, :-12], model.new_cache(*tokens.shape)), *one_by_one]


@pytest.mark.parametrize("options", [{}, {"weight": "binary"}, {"act_bits": 4}, {"recipe": {"scale_per": 64}}], ids=str)
@pytest.mark.parametrize("isa", ["torch", "portable", "avx2", "avx512", "amx"])
def test_every_path_gives_the_same_logits(isa: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is chosen once a process by an environment variable; here the choice is made anew."""
    functions = (native.library, native.best_isa, native.lanes_of_torch, native.exp_lanes_of_torch)
    best = native.best_isa()
    if isa != "torch" and native.Isa[isa.upper()] > best:
        pytest.skip(f"this machine has no {isa} (its best is {best.name})")
    model = low_bit_model(dim=128, ffn_dim=256, **options)
    tokens = [torch.randint(97, (batch, 33)) for batch in (1, 2)]
    expected = [logits_of(model, part) for part in tokens]
    monkeypatch.setenv("BITNET_CPU_ISA", isa)
    try:
        for function in functions:
            function.cache_clear()
        assert native.library() is None if isa == "torch" else native.best_isa() == native.Isa[isa.upper()]
        packed = pack(model)
        for part, logits in zip(tokens, expected, strict=True):
            if isa == "torch":  # whose attention adds up a cache in another order
                logits[1:] = logits_of(model, part)[1:]
            for found, wanted in zip(logits_of(packed, part), logits, strict=True):
                assert torch.equal(found, wanted)
        assert (packed._native_decoder() is not None) == (isa != "torch" and options in ({}, {"weight": "binary"}))
    finally:
        monkeypatch.undo()
        for function in functions:
            function.cache_clear()


def test_trained_models_serve_what_they_learned(trained: Path, tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(trained)
    file = tmp_path / "m.safetensors"
    save_packed(pack(model), tokenizer, file)
    packed, _ = load_packed(file)
    assert_same(model, packed, ((1, 1), (1, 20), (2, 17), (5, 16)))


def test_batches_of_unequal_prompts(trained: Path) -> None:
    model, _ = load_checkpoint(trained)
    packed = pack(model)
    prompts = [[5, 6, 7, 8, 9], [3], [10, 4, 4]]
    both = [list(generate_batch(m, prompts, 20, GREEDY)) for m in (model, packed)]
    assert both[0] == both[1]


def test_packing_changes_nothing_of_the_model() -> None:
    model = low_bit_model()
    before = weights_digest(model.state_dict())
    packed = pack(model, head="int8")
    with torch.inference_mode():
        packed(torch.randint(97, (1, 5)))
    assert weights_digest(model.state_dict()) == before
    assert any(isinstance(m, BitLinear) for m in model.modules())


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("head,bound", [("float16", 2e-3), ("bfloat16", 1.2e-2), ("int8", 1e-2)])
def test_smaller_heads_round_and_no_more(head: str, bound: float, tie_embeddings: bool) -> None:
    """Against float64 with the rounded tables put into the model as it was trained."""
    model = low_bit_model(tie_embeddings=tie_embeddings)
    packed = pack(model, head=head)
    table = packed.tok_embeddings.table
    assert (packed.lm_head.table is table) == tie_embeddings
    rounded, weight = table.rows(slice(None)), model.tok_embeddings.weight.detach()
    assert float((rounded - weight).abs().max() / weight.abs().max()) < bound
    tokens = torch.randint(97, (2, 9))
    with torch.no_grad():
        model.tok_embeddings.weight.copy_(rounded)
        if not tie_embeddings:
            model.lm_head.weight.copy_(packed.lm_head.table.rows(slice(None)))
        expected, got = model(tokens), packed(tokens)
        assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))
        one = packed(tokens[:1], last_only=True)
        assert torch.allclose(one, expected[:1, -1:], atol=1e-4 * float(expected.abs().max()))


def test_joined_matrices_share_their_bytes_and_move_together() -> None:
    packed = pack(low_bit_model())
    a = packed.layers[0].attention
    size = a.wq.packed.numel()
    assert a.wk.packed.data_ptr() == a.wq.packed.data_ptr() + size
    moved = packed.double().float()
    assert moved.layers[0].attention.wq.packed.dtype == torch.uint8
    tokens = torch.randint(97, (1, 7))
    with torch.inference_mode():
        cache = moved.new_cache(1, 20)
        moved(tokens, cache)
        assert torch.equal(moved(tokens[:, :1], cache), packed_step(low_bit_model(), tokens))


def packed_step(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    cache = model.new_cache(1, 20)
    model(tokens, cache)
    return model(tokens[:, :1], cache)


def test_packed_weights_are_those_of_the_model() -> None:
    for weight, format in (("ternary", "ternary2"), ("binary", "binary1")):
        model = low_bit_model(weight=weight)
        packed = pack(model)
        for name, layer in low_bit_layers(model).items():
            q, inv_scale = layer.quantized_weight()
            served = packed.get_submodule(name)
            assert served.format == format
            assert torch.equal(FORMATS[format].unpack(served.packed, *q.shape), q)
            assert float(served.inv_scale) == float(inv_scale)


@pytest.mark.parametrize("head", ["float32", "int8"])
def test_a_dtype_of_the_model_does_not_touch_what_is_stored(head: str) -> None:
    packed, reference = pack(low_bit_model(), head=head), pack(low_bit_model(), head=head)
    packed = packed.bfloat16()
    for name, layer in reference.named_modules():
        if isinstance(layer, PackedLinear):
            assert torch.equal(packed.get_submodule(name).inv_scale, layer.inv_scale)
    if head == "int8":
        assert torch.equal(packed.lm_head.table.scale, reference.lm_head.table.scale)
        assert packed.lm_head.table.weight.dtype == torch.int8
    tokens = torch.randint(97, (2, 12))
    with torch.inference_mode():
        logits, expected = packed(tokens), reference(tokens)
        cache = packed.new_cache(2, 20)
        packed(tokens, cache)
        packed(tokens[:, :1], cache)
    assert packed.layers[0].attention_norm.weight.dtype == torch.bfloat16
    assert float((logits.float() - expected).abs().mean()) < 0.1 * float(expected.std())


def test_a_float_model_has_nothing_to_pack() -> None:
    with pytest.raises(UserError, match="nothing to pack"):
        pack(low_bit_model(weight="none", act_bits="none"))
    with pytest.raises(UserError, match="float weights"):
        mixed = low_bit_model()
        mixed.layers[0].attention.wq.weight_kind = "none"
        pack(mixed)
    with pytest.raises(UserError, match="head = int4"):
        pack(low_bit_model(), head="int4")
