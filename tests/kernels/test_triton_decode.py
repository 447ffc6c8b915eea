"""Attention of one new token, and the gate, against torch: interpreted, or on a GPU (``TRITON_INTERPRET=0``)."""

import os

import pytest
import torch
from torch.nn import functional as F

from bitnet.graph import GraphDecoder
from bitnet.model import Transformer, relu2, rotary_angles, rotary_frequencies, rotate

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but for bfloat16 in the interpreter, which cuts what a GPU rounds."""
    tolerance = 2.0**-6 if INTERPRETED and expected.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.fixture
def device() -> str:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 and no CUDA device")
    return "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, groups, dim", [(4, 2, 24), (3, 3, 64), (4, 1, 16)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_token(device: str, dtype: torch.dtype, heads: int, groups: int, dim: int, padded: bool) -> None:
    from bitnet_kernels.triton_decode import attend, rotate_and_append

    torch.manual_seed(0)
    batch, room = 3, 150
    joined = torch.randn(batch, 1, (heads + 2 * groups) * dim, dtype=dtype)  # as one product gives it
    for place in (0, 5, 63, 64, 130):
        keys, values = (torch.randn(2, batch, groups, room, dim, dtype=dtype) for _ in range(2))
        first = torch.tensor([0, place // 2, place]) if padded else None
        positions = torch.tensor([place]) if first is None else (place - first)[:, None, None]
        angles = rotary_angles(positions, rotary_frequencies(dim, 1e4, torch.device("cpu")))
        q, k, v = joined.split([heads * dim, groups * dim, groups * dim], dim=-1)
        given = [t.to(device) for t in (joined, keys.clone(), values.clone(), torch.tensor([place]), *angles)]
        on_device, new_keys, new_values, at = given[:4]
        parts = on_device.split([heads * dim, groups * dim, groups * dim], dim=-1)
        turned = rotate_and_append(*parts, (given[4], given[5]), new_keys[1], new_values[1], at)

        def by_head(x: torch.Tensor, count: int) -> torch.Tensor:
            return x.view(batch, 1, count, dim).transpose(1, 2)

        cos, sin = (angle.to(dtype) for angle in angles)
        q, k = rotate(by_head(q, heads), cos, sin), rotate(by_head(k, groups), cos, sin)
        keys[1, :, :, place], values[1, :, :, place] = k[:, :, 0], by_head(v, groups)[:, :, 0]
        same(new_keys, keys)
        same(new_values, values)
        same(turned, q[:, :, 0])

        y = attend(turned, new_keys[1], new_values[1], at, None if first is None else first.to(device)).cpu()
        seen = torch.arange(place + 1) >= (torch.zeros(batch, 1) if first is None else first[:, None])
        exact = F.scaled_dot_product_attention(
            q.double(),
            keys[1, :, :, : place + 1].double().repeat_interleave(heads // groups, 1),
            values[1, :, :, : place + 1].double().repeat_interleave(heads // groups, 1),
            attn_mask=seen[:, None, None],
        )
        assert y.dtype == dtype and y.shape == (batch, 1, heads * dim)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(y.double().view(batch, heads, dim), exact[:, :, 0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate(device: str, dtype: torch.dtype) -> None:
    from bitnet_kernels.triton_decode import relu2_gate

    both = torch.randn(2, 3, 2 * 1100).to(dtype)
    both[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    gate, up = both.split(1100, dim=-1)
    same(relu2_gate(*both.to(device).split(1100, dim=-1)), relu2(gate) * up)
    assert relu2_gate(gate[:0].to(device), up[:0].to(device)).shape == (0, 3, 1100)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU tests/inference/test_gpu.py decodes")
@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_a_model_decodes_as_it_does_with_torch(padded: bool, tiny_config, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Transformer(tiny_config).eval()
    tokens, steps = torch.randint(97, (2, 5)), torch.randint(97, (6, 2, 1))

    def logits(as_graph: bool) -> list[torch.Tensor]:
        cache = model.new_cache(2)
        cache.first = torch.tensor([0, 2]) if padded else None
        model(tokens, cache)
        decode = GraphDecoder(model, cache) if as_graph else lambda token: model(token, cache)[:, -1]
        return [decode(token).clone() for token in steps]

    expected = logits(as_graph=False)
    calls = []
    monkeypatch.setattr("bitnet.model.attends_in_one_kernel", lambda x, cache: calls.append(cache.reach) or True)
    for as_graph in (False, True):
        for found, wanted in zip(logits(as_graph), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    layers = tiny_config.n_layers
    assert calls == [reach for reach in range(6, 12) for _ in range(layers)] + [64] * 6 * layers
