"""The transformer against transformers' Llama and BitNet, and against itself through the cache."""

import pytest
import torch

from bitnet.config import ModelConfig
from bitnet.model import RMSNorm, Transformer

from .conftest import Recorded

transformers = pytest.importorskip("transformers")


def hf_twin(config: ModelConfig) -> torch.nn.Module:
    """transformers' model of the same sizes: BitNet with sub-norms, Llama without."""
    kind = "BitNet" if config.sub_norm else "Llama"
    hf_config = getattr(transformers, f"{kind}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        hidden_act=config.activation,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        attention_bias=False,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(hf_config).eval()


NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.attn_sub_norm": "self_attn.attn_sub_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.ffn_sub_norm": "mlp.ffn_sub_norm",
}


def hf_name(key: str) -> str:
    stem = key.removesuffix(".weight")
    if stem.startswith("layers."):
        _, layer, rest = stem.split(".", 2)
        return f"model.layers.{layer}.{NAMES[rest]}.weight"
    return f"{NAMES[stem]}.weight"


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("sub_norm", [True, False])
def test_logits_equal_transformers(sub_norm, activation, tie) -> None:
    config = ModelConfig(
        vocab_size=131,
        dim=48,
        n_layers=3,
        n_heads=6,
        n_kv_heads=2,
        ffn_dim=80,
        max_seq_len=64,
        activation=activation,
        sub_norm=sub_norm,
        tie_embeddings=tie,
        rope_theta=5e5,
    )
    torch.manual_seed(0)
    ours = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():  # norms away from 1, so that a missing one shows
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.mul_(5.0)
    theirs = hf_twin(config)
    theirs.load_state_dict({hf_name(k): v for k, v in ours.state_dict().items()}, strict=True)
    tokens = torch.randint(131, (3, 64))
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_the_gate_is_of_its_inputs_dtype_under_cuda_autocast() -> None:
    """There a power becomes float32 and a product does not: one would train with other numbers than are served."""
    config = ModelConfig(vocab_size=61, dim=32, n_layers=1, n_heads=4, ffn_dim=48, activation="relu2")
    feed_forward, gate, up = Transformer(config).layers[0].feed_forward, torch.randn(3, 48), torch.randn(3, 48)
    with Recorded() as recorded:
        y = feed_forward.gated(gate, up)
    assert {name.split(".")[1] for name in recorded.names} == {"relu", "mul"}
    assert torch.equal(y, gate.clamp(min=0) ** 2 * up)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cache_gives_the_logits_of_the_full_forward(kv_heads) -> None:
    config = ModelConfig(vocab_size=61, dim=32, n_layers=2, n_heads=4, n_kv_heads=kv_heads, ffn_dim=48, max_seq_len=24)
    torch.manual_seed(1)
    model = Transformer(config).eval()
    tokens = torch.randint(61, (2, 24))
    with torch.no_grad():
        full = model(tokens)
        for chunks in ([24], [10, 1, 1, 12], [1] * 24, [5, 19]):
            cache = model.new_cache(2)
            parts = [model(part, cache) for part in tokens.split(chunks, dim=1)]
            assert cache.length == 24
            torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="25 tokens exceed the limit of 24"):
            model(tokens[:, :1], cache)
        with pytest.raises(ValueError, match="25 tokens"):
            model(torch.zeros(1, 25, dtype=torch.int64))


def test_document_mask_hides_other_documents(tiny_config) -> None:
    model = Transformer(tiny_config).eval()
    first, second = torch.randint(97, (1, 20)), torch.randint(97, (1, 12))
    ids = torch.tensor([[0] * 20 + [1] * 12])
    with torch.no_grad():
        together = model(torch.cat([first, second], dim=1), document_ids=ids)
        # Rotary positions are relative, so the second document reads the same wherever it stands.
        torch.testing.assert_close(together[:, :20], model(first), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[:, 20:], model(second), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(torch.cat([first, second], dim=1))[:, 20:], together[:, 20:], atol=1e-3)


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.0)
    assert norm(torch.tensor([[3.0, 4.0]]))[0].tolist() == pytest.approx([3 / 12.5**0.5, 4 / 12.5**0.5])


def test_causality(tiny_config) -> None:
    model = Transformer(tiny_config).eval()
    tokens = torch.randint(97, (1, 16))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 97
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :10], b[:, :10]) and not torch.equal(a[:, 10:], b[:, 10:])


def test_norm_groups_cover_every_linear_of_a_block(tiny_config) -> None:
    block = Transformer(tiny_config).layers[0]
    linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
    grouped = [linear for _, group in block.norm_groups() for linear in group]
    assert {id(m) for m in grouped} == {id(m) for m in linears} and len(grouped) == 7


def test_dropout_acts_only_in_training() -> None:
    config = ModelConfig(vocab_size=61, dim=32, n_layers=1, n_heads=2, ffn_dim=48, max_seq_len=8, dropout=0.5)
    model, tokens = Transformer(config), torch.randint(61, (1, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
