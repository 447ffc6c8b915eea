"""One file per low-bit method, or per family of methods. ``RECIPES`` names those that a checkpoint may refer to."""

from bitnet.recipes.awq import AWQ
from bitnet.recipes.base import Progress, Recipe, no_progress
from bitnet.recipes.bitnet import BitNet
from bitnet.recipes.blockwise import PEQA, EfficientQAT, ZeroQuant
from bitnet.recipes.distillation import LLMQAT, Distilled
from bitnet.recipes.gptq import GPTQ, SpQR
from bitnet.recipes.lora import LoftQ, QALoRA, QLoRA
from bitnet.recipes.post_training import RTN, PostTraining
from bitnet.recipes.qat import QAT
from bitnet.recipes.smoothquant import LLMInt8, SmoothQuant

POST_TRAINING: dict[str, type[PostTraining]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "awq": AWQ,
    "spqr": SpQR,
    "llm_int8": LLMInt8,
    "smoothquant": SmoothQuant,
    "zeroquant": ZeroQuant,
    "efficient_qat": EfficientQAT,
    "qat": QAT,
    "llm_qat": LLMQAT,
    "peqa": PEQA,
    "qlora": QLoRA,
    "loftq": LoftQ,
    "qa_lora": QALoRA,
}
"""Recipes that start from a trained float model, by the name they have on the command line."""

RECIPES: dict[str, type[Recipe]] = {
    "BitNet": BitNet,
    "Distilled": Distilled,
    **{kind.__name__: kind for kind in POST_TRAINING.values()},
}

__all__ = [
    "AWQ", "GPTQ", "LLMQAT", "PEQA", "POST_TRAINING", "QAT", "RECIPES", "RTN", "BitNet", "Distilled", "EfficientQAT",
    "LLMInt8", "LoftQ", "PostTraining", "Progress", "QALoRA", "QLoRA", "Recipe", "SmoothQuant", "SpQR", "ZeroQuant",
    "no_progress",
]  # fmt: skip
