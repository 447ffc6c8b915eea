"""One file per low-bit method. ``RECIPES`` names those that a checkpoint may refer to."""

from bitnet.recipes.base import Recipe
from bitnet.recipes.bitnet import BitNet

RECIPES: dict[str, type[Recipe]] = {"BitNet": BitNet}

__all__ = ["RECIPES", "BitNet", "Recipe"]
