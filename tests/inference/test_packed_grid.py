"""Every recipe's result through the packed file: the same integers, the same logits, the bytes that were promised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from bitnet.checkpoint import recipe_options
from bitnet.errors import UserError
from bitnet.inference.files import load_packed, save_packed
from bitnet.inference.packing import pack
from bitnet.layers import quantized_layers
from bitnet.model import Transformer
from bitnet.recipes import GPTQ, RTN, LLMInt8, Recipe, SmoothQuant, SpQR
from tests.recipes.conftest import random_model, token_batches
from tests.recipes.test_contract import RECIPES


def finished(recipe: Recipe) -> tuple[Transformer, Recipe]:
    """A model under ``recipe`` as a checkpoint of it would be loaded."""
    model, data = random_model(), token_batches()
    with torch.enable_grad():
        recipe.prepare(model, data if recipe.needs_text else [])
    recipe.on_step(model, 100, 100)
    served = recipe.served(100, 100)
    served.finalize(model)
    return model.eval(), served


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@torch.no_grad()
def test_packed_and_loaded_equals_trained(recipe: Recipe, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, served = finished(recipe)
    packed = pack(model)
    save_packed(packed, tokenizer, tmp_path / "m.safetensors", recipe=recipe_options(served))
    loaded, _ = load_packed(tmp_path / "m.safetensors")
    for x in (token_batches()[0], token_batches()[0][:1, :3]):  # many tokens, and few
        expected = model(x)
        assert torch.equal(packed(x), expected) and torch.equal(loaded(x), expected)
    cache, reference = loaded.new_cache(2), model.new_cache(2)
    x = token_batches()[0][:2]
    loaded(x[:, :9], cache), model(x[:, :9], reference)
    for at in range(9, 20):
        assert torch.equal(loaded(x[:, at : at + 1], cache), model(x[:, at : at + 1], reference))


def test_what_looks_at_its_inputs_is_no_graph() -> None:
    """LLM.int8() asks which columns have outliers: the CPU waits for the answer."""
    graphs = {str(recipe): pack(finished(recipe)[0]).decodes_as_graph for recipe in (RTN(bits=4), LLMInt8())}
    assert list(graphs.values()) == [True, False], graphs


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_matrix_takes_the_bits_it_should(bits) -> None:
    model, _ = finished(RTN(bits=bits, group_size=64))
    for name, layer in quantized_layers(pack(model)).items():
        weights = layer.in_features * layer.out_features
        padded = -(-layer.in_features // 256) * 256 * layer.out_features
        state: dict[str, Any] = layer.state_dict()
        assert set(state) == {"codes", "scale", "zero_point"}, name
        assert state["codes"].nbytes == padded * bits // 8
        assert state["scale"].nbytes == weights // 64 * 2 and state["zero_point"].nbytes == weights // 64


@torch.no_grad()
def test_few_tokens_and_many_agree() -> None:
    """Integer activations bit for bit, through the kernel and through torch; float ones within a float32 sum."""
    for recipe, exact in (
        (RTN(bits=4, group_size=32, activation_bits=8), True),
        (SmoothQuant(weight_scale="channel"), True),
        (GPTQ(bits=3, group_size=32), False),
        (SpQR(bits=3), False),
    ):
        model, _ = finished(recipe)
        layer = model.layers[0].feed_forward.w2
        x = torch.randn(32, 128)
        many, few = layer(x), torch.cat([layer(part) for part in x.split(1)])
        if exact:
            assert torch.equal(many, few)
        else:
            torch.testing.assert_close(many, few, rtol=1e-5, atol=1e-5)


def test_a_recipe_that_lies_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, served = finished(RTN(bits=4, group_size=32))
    file = tmp_path / "m.safetensors"
    for change, named in (
        ({"bits": 3}, "another shape"),
        ({"bits": 40}, "bits = 40"),
        ({"group_size": 5}, "5 does not"),
    ):
        save_packed(pack(model), tokenizer, file, recipe={**recipe_options(served), **change})
        with pytest.raises(UserError, match=named):
            load_packed(file)


def test_kept_weights_outside_the_matrix_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, served = finished(SpQR(bits=3))
    packed = pack(model)
    next(iter(quantized_layers(packed).values())).outlier_at[-1] = 10**9
    save_packed(packed, tokenizer, tmp_path / "m.safetensors", recipe=recipe_options(served))
    with pytest.raises(UserError, match="keeps weights that it does not have"):
        load_packed(tmp_path / "m.safetensors")
