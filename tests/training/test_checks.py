"""What is refused before a run begins because of its sizes, and the random state of a process with a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.layers import Arithmetic
from bitnet.recipes import BitNet, Distilled, Recipe
from bitnet.training.lit import LitBitNet
from bitnet.training.random_state import random_state, set_random_state

INT16 = Arithmetic(weight_gradient="int16")


@pytest.mark.parametrize(
    "recipe,arithmetic,rows,message",
    [
        (BitNet(), Arithmetic(), 2**20, None),
        (BitNet(), INT16, 2**17 // 64, None),  # 131,072 tokens: their sums just fit
        (BitNet(), INT16, 132_104 // 64 + 1, "data.batch_size x data.seq_len = 132160: .* 132104 tokens at most"),
        (Distilled(relation_layer=1), Arithmetic(), 1, None),
        (Distilled(relation_layer=-2), Arithmetic(), 1, None),
        (Distilled(relation_layer=2), Arithmetic(), 1, "relation_layer = 2: the model has the layers 0 to 1"),
        (Distilled(relation_layer=-3), Arithmetic(), 1, "relation_layer = -3"),
    ],
)
def test_sizes(
    recipe: Recipe, arithmetic: Arithmetic, rows: int, message: str | None, tiny_config: ModelConfig
) -> None:
    module = LitBitNet(tiny_config, recipe, arithmetic=arithmetic)
    data: Any = SimpleNamespace(seq_len=64, batch_size=rows)
    if message is None:
        module.check_sizes(data)
    else:
        with pytest.raises(UserError, match=message):
            module.check_sizes(data)


@pytest.mark.parametrize("saved_by_all", [False, True])
def test_every_process_goes_on_with_the_state_of_the_device_that_saved(
    saved_by_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other devices had not drawn a number in the process that saved; older checkpoints have the states of all."""
    drawn, seed = torch.tensor([7], dtype=torch.uint8), torch.tensor([0], dtype=torch.uint8)
    put: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: drawn)
    monkeypatch.setattr(torch.cuda, "set_rng_state", put.append)
    state = random_state()
    if saved_by_all:
        state["cuda"] = [drawn, seed]
    set_random_state(state)
    assert put == [drawn]
