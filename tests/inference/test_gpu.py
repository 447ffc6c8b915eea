"""On a GPU: packed equals training bit for bit, and the CUDA graph equals the steps it was captured from.

Run with ``TRITON_INTERPRET=0``; where there is no GPU everything here is skipped, and says so.
"""

import os

import pytest
import torch

from bitnet.generation import prefill
from bitnet.graph import GraphDecoder
from bitnet.inference.packing import pack
from bitnet.layers import Arithmetic, low_bit_layers
from bitnet.layers.levels_together import hold_levels, release_levels
from tests.inference.conftest import low_bit_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1",
        reason="no CUDA device, or TRITON_INTERPRET is not 0",
    ),
]


@pytest.mark.parametrize("weight", ["ternary", "binary"])
@pytest.mark.parametrize("sub_norm", [True, False])
@torch.inference_mode()
def test_logits_are_bit_equal(weight: str, sub_norm: bool) -> None:
    model = low_bit_model(weight=weight, sub_norm=sub_norm, dim=256, ffn_dim=700).cuda()
    packed = pack(model).cuda()
    for B, T in ((1, 1), (1, 17), (3, 40)):
        tokens = torch.randint(97, (B, T), device="cuda")
        assert torch.equal(model(tokens), packed(tokens))
        caches = [m.new_cache(B, T + 8) for m in (model, packed)]
        a, b = (m(tokens, c) for m, c in zip((model, packed), caches, strict=True))
        assert torch.equal(a, b)
        for _ in range(8):
            token = a[:, -1:].argmax(-1)
            a, b = (m(token, c) for m, c in zip((model, packed), caches, strict=True))
            assert torch.equal(a, b)


@torch.inference_mode()
def test_the_graph_equals_its_steps() -> None:
    packed = pack(low_bit_model(dim=256, ffn_dim=700), head="int8").cuda()
    tokens = torch.randint(97, (2, 9), device="cuda")
    caches = [packed.new_cache(2, 60) for _ in range(2)]
    logits = [prefill(packed, tokens, cache) for cache in caches]
    graph, steps = GraphDecoder(packed, caches[0]), GraphDecoder(packed, caches[1], capture=False)
    for _ in range(30):
        token = logits[0].argmax(-1, keepdim=True)
        logits = [graph(token).clone(), steps(token).clone()]
        assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("weight", ["ternary", "binary"])
def test_the_training_forward_is_bit_equal_too(weight: str) -> None:
    """In float32: with gradients, with all weights quantized at once, on both kinds of units."""
    model = low_bit_model(weight=weight, sub_norm=True, dim=256, ffn_dim=700).cuda().train()
    tokens = torch.randint(97, (3, 40), device="cuda")
    with torch.inference_mode():
        expected = pack(model).cuda()(tokens)
    layers = low_bit_layers(model).values()
    for forward in ("auto", "int8"):
        for layer in layers:
            layer.arithmetic = Arithmetic(forward=forward)
        hold_levels(layers)
        assert all(not layer.holds_nothing for layer in layers)
        logits = model(tokens)
        logits.sum().backward()
        release_levels(layers)
        assert torch.equal(logits, expected), forward


def test_scales_and_gradients_are_those_of_a_cpu() -> None:
    on_cpu = low_bit_model(sub_norm=True, dim=256, ffn_dim=700).train()
    on_gpu = low_bit_model(sub_norm=True, dim=256, ffn_dim=700).cuda().train()
    for a, b in zip(low_bit_layers(on_cpu).values(), low_bit_layers(on_gpu).values(), strict=True):
        for x, y in zip(a.quantized_weight(), b.quantized_weight(), strict=True):
            assert torch.equal(x, y.cpu())
    x = torch.randn(6, 256)
    found = []
    for norm in (on_cpu.norm, on_gpu.norm):
        device = norm.weight.device
        inputs = x.clone().to(device).requires_grad_()
        (norm(inputs) * torch.arange(256, device=device)).sum().backward()
        found.append((inputs.grad.cpu(), norm.weight.grad.cpu()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
