"""Scores against values worked out by hand."""

import math

import pytest
import torch
from torch import nn

from bitnet.loss import IGNORE, Score, next_token_loss, score


class Fixed(nn.Module):
    """Says 1/2, 1/4, 1/4 whatever comes in."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.5, 0.25, 0.25]).log().expand(*inputs.shape, 3)


def test_bits_per_byte_by_hand() -> None:
    # 1 + 2 + 2 + 1 bits over four targets; id 0 is end-of-text and stands for no byte, the others for 3 and 1.
    batch = {"inputs": torch.zeros(1, 5, dtype=torch.int64), "targets": torch.tensor([[0, 1, 2, 0, IGNORE]])}
    total = score(Fixed(), [batch, batch], torch.tensor([0.0, 3.0, 1.0]))
    assert (total.tokens, total.text_bytes) == (8, 8)
    assert total.bits_per_byte == pytest.approx(12 / 8)
    assert total.loss == pytest.approx(1.5 * math.log(2)) == next_token_loss(Fixed(), batch).item()
    assert total.perplexity == pytest.approx(2**1.5)


def test_empty_score_is_not_a_number() -> None:
    assert math.isnan(Score().loss) and math.isnan(Score().bits_per_byte)
