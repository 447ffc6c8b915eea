"""Pre-train 1-bit and 1.58-bit transformers, and serve exactly what was trained.

``load_checkpoint`` gives the model of a run, ``pack`` and ``load_packed`` the packed one, ``generate`` text of either;
``Transformer``, ``BitLinear``, ``swap_linears`` and ``BitNet`` are the parts to build with; ``LitBitNet`` and
``TokenDataModule`` (imported on first use, since they need Lightning) train.
"""

from typing import TYPE_CHECKING, Any

from bitnet.checkpoint import load_checkpoint as load_checkpoint
from bitnet.config import ModelConfig as ModelConfig
from bitnet.config import OptimConfig as OptimConfig
from bitnet.config import ScheduleConfig as ScheduleConfig
from bitnet.errors import UserError as UserError
from bitnet.generate import Sampling as Sampling
from bitnet.generate import generate as generate
from bitnet.generate import generate_tokens as generate_tokens
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

if TYPE_CHECKING:
    from bitnet.data.datamodule import TokenDataModule as TokenDataModule
    from bitnet.training.lit import LitBitNet as LitBitNet

__version__ = "0.1.0"

_LIGHTNING = {"LitBitNet": "bitnet.training.lit", "TokenDataModule": "bitnet.data.datamodule"}


def __getattr__(name: str) -> Any:
    if name in _LIGHTNING:
        from importlib import import_module

        return getattr(import_module(_LIGHTNING[name]), name)
    raise AttributeError(f"module 'bitnet' has no attribute {name!r}")
