"""Pre-train 1-bit and 1.58-bit transformers, and serve exactly what was trained.

``load_checkpoint`` gives the model of a run, ``pack`` and ``load_packed`` the packed one, ``generate`` text of either;
``Transformer``, ``BitLinear``, ``swap_linears`` and ``BitNet`` are the parts to build with; ``LitBitNet`` and
``TokenDataModule`` train. Each is imported on first use: torch takes seconds, and ``bitnet --help`` should not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet.checkpoint import load_checkpoint as load_checkpoint
    from bitnet.config import ModelConfig as ModelConfig
    from bitnet.config import OptimConfig as OptimConfig
    from bitnet.config import ScheduleConfig as ScheduleConfig
    from bitnet.data.datamodule import TokenDataModule as TokenDataModule
    from bitnet.errors import UserError as UserError
    from bitnet.generation import Sampling as Sampling
    from bitnet.generation import generate as generate
    from bitnet.generation import generate_tokens as generate_tokens
    from bitnet.inference.files import load_model as load_model
    from bitnet.inference.files import load_packed as load_packed
    from bitnet.inference.files import save_packed as save_packed
    from bitnet.inference.packing import pack as pack
    from bitnet.layers import BitLinear as BitLinear
    from bitnet.layers import swap_linears as swap_linears
    from bitnet.model import KVCache as KVCache
    from bitnet.model import Transformer as Transformer
    from bitnet.recipes import BitNet as BitNet
    from bitnet.recipes import Recipe as Recipe
    from bitnet.training.lit import LitBitNet as LitBitNet

__version__ = "0.1.0"

_MODULES = {
    "bitnet.checkpoint": ("load_checkpoint",),
    "bitnet.config": ("ModelConfig", "OptimConfig", "ScheduleConfig"),
    "bitnet.data.datamodule": ("TokenDataModule",),
    "bitnet.errors": ("UserError",),
    "bitnet.generation": ("Sampling", "generate", "generate_tokens"),
    "bitnet.inference.files": ("load_model", "load_packed", "save_packed"),
    "bitnet.inference.packing": ("pack",),
    "bitnet.layers": ("BitLinear", "swap_linears"),
    "bitnet.model": ("KVCache", "Transformer"),
    "bitnet.recipes": ("BitNet", "Recipe"),
    "bitnet.training.lit": ("LitBitNet",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'bitnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
