"""What the model card of an export says about weights, activations and architecture."""

import dataclasses
from pathlib import Path

import pytest

from bitnet.checkpoint import recipe_options
from bitnet.interchange.exporting import export_hf
from bitnet.recipes import RTN, BitNet, Recipe, SmoothQuant

from .conftest import opened_model

NOT_QUANTIZED = "Activations are not quantized in this form"


def card_of(recipe: Recipe, folder: Path, **sizes: object) -> str:
    opened = opened_model(weight="none", act_bits="none", **sizes)
    recipe.prepare(opened.model)
    opened = dataclasses.replace(opened, recipe=recipe_options(recipe))
    export_hf(opened, folder, name="m", source=folder, form="dense", dtype="float32", check_tokens=0)
    return (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "recipe,said,differs",
    [
        (BitNet(), "ternary weights (1.58 bits) and 8-bit activations:", True),
        (BitNet(act_bits="none"), "ternary weights (1.58 bits):", False),
        (BitNet(weight="none", act_bits=8), "float weights and 8-bit activations:", True),
        (BitNet(weight="none", act_bits="none"), "float weights:", False),
        (RTN(group_size=16), "4-bit weights (RTN):", False),
        (SmoothQuant(group_size=0, level="o3"), "8-bit weights (SmoothQuant):", True),
    ],
    ids=str,
)
def test_weights_and_activations_are_those_of_the_recipe(
    recipe: Recipe, said: str, differs: bool, tmp_path: Path
) -> None:
    card = card_of(recipe, tmp_path / "m")
    assert said in card and (NOT_QUANTIZED in card) == differs


@pytest.mark.parametrize("sub_norm,tag", [(True, "bitnet"), (False, "llama")])
def test_the_tag_is_the_architecture(sub_norm: bool, tag: str, tmp_path: Path) -> None:
    card = card_of(BitNet(weight="none", act_bits="none"), tmp_path / "m", sub_norm=sub_norm)
    assert f"tags:\n- {tag}\n---" in card
    assert f'"model_type": "{tag}"' in (tmp_path / "m" / "config.json").read_text()
