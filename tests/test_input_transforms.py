"""Hadamard and top-half against the matrix written out and a sort, and packed models that use them."""

import pytest
import torch

from bitnet.errors import UserError
from bitnet.inference.files import load_packed, save_packed
from bitnet.inference.packing import pack
from bitnet.input_transforms import block_of, hadamard, top_half
from bitnet.interchange.parts import matrices
from bitnet.layers import low_bit_layers
from tests.inference.conftest import (
    low_bit_model,
    tokenizer,  # noqa: F401 - a fixture
)
from tests.inference.test_packing import assert_same


@pytest.mark.parametrize("k", [1, 2, 3, 64, 96, 100, 384])
def test_hadamard_is_the_matrix_block_by_block(k) -> None:
    x = torch.randn(2, 5, k, dtype=torch.float64)
    size = block_of(k)
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    h = torch.tensor(signs, dtype=torch.float64) * size**-0.5
    expected = (x.view(2, 5, -1, size) @ h.T).view(x.shape)
    torch.testing.assert_close(hadamard(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-12, atol=1e-12)  # its own inverse


def test_hadamard_rows_do_not_depend_on_their_batch() -> None:
    x = torch.randn(9, 384)
    assert all(torch.equal(hadamard(x)[i], hadamard(x[i : i + 1])[0]) for i in range(9))


def test_hadamard_tames_an_outlier() -> None:
    x = torch.randn(1, 512)
    x[0, 7] = 100.0
    assert float(hadamard(x).abs().max()) < 10
    grad = torch.autograd.grad((hadamard(x.requires_grad_()) * 2).square().sum(), x)[0]
    torch.testing.assert_close(grad, 8 * x.detach(), rtol=1e-5, atol=1e-4)  # orthogonal: |Hx|^2 = |x|^2


@pytest.mark.parametrize("k", [1, 2, 7, 100])
def test_top_half_keeps_the_largest(k) -> None:
    x = torch.randn(6, k)
    y = top_half(x)
    kept = -(-k // 2)
    for row, found in zip(x, y, strict=True):
        order = row.abs().argsort(descending=True)
        assert torch.equal(found[order[:kept]], row[order[:kept]]) and not found[order[kept:]].any()
    grad = torch.autograd.grad(top_half(x.requires_grad_()).sum(), x)[0]
    assert torch.equal(grad, (y != 0).float())


@pytest.mark.parametrize("transform", [top_half, hadamard])
def test_nan_stays_nan(transform) -> None:
    x = torch.randn(2, 8)
    x[1, 3] = float("nan")
    y = transform(x)
    assert y[0].isfinite().all() and y[1].isnan().any()


@pytest.mark.parametrize("weight", ["ternary", "binary"])
@pytest.mark.parametrize("scale_per", ["matrix", 64])
@pytest.mark.parametrize("act_bits", [8, 4])
@pytest.mark.parametrize("transform", ["hadamard", "top_half"])
def test_models_are_served_as_trained(transform, act_bits, scale_per, weight, tokenizer, tmp_path) -> None:  # noqa: F811
    recipe = {"transform": transform, "scale_per": scale_per, "keep_8bit": ("wo", "w2")}
    model = low_bit_model(weight=weight, act_bits=act_bits, recipe=recipe, dim=128, ffn_dim=128)
    assert {n.rpartition(".")[2] for n, m in low_bit_layers(model).items() if m.transform != "none"} == {"wo", "w2"}
    packed = pack(model)
    assert_same(model, packed, ((1, 9), (3, 20)))
    save_packed(packed, tokenizer, tmp_path / "m.safetensors")
    assert_same(model, load_packed(tmp_path / "m.safetensors")[0], ((1, 9),))
    plain = low_bit_model(weight=weight, act_bits=act_bits, recipe={"scale_per": scale_per}, dim=128, ffn_dim=128)
    tokens = torch.arange(20)[None]
    assert not torch.equal(plain(tokens), model(tokens))


def test_exports_refuse_what_no_other_program_computes() -> None:
    model = low_bit_model(recipe={"transform": "hadamard"})
    for form in (model, pack(model)):
        with pytest.raises(UserError, match="transform"):
            list(matrices(form))
