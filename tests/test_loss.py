"""Scores against values worked out by hand."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bitnet.loss import IGNORE, Score, chunked_nats, next_token_loss, score
from bitnet.model import Transformer
from bitnet.recipes import BitNet


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


# ---- the loss that never holds all logits


def ragged_batch(vocab_size: int = 97) -> dict[str, torch.Tensor]:
    """3 x 11 tokens in two documents a row, a third of the targets not to be learned."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (3, 12), generator=generator)
    targets = ids[:, 1:].masked_fill(torch.rand(3, 11, generator=generator) < 1 / 3, IGNORE)
    return {"inputs": ids[:, :-1], "targets": targets, "document_ids": (torch.arange(11) > 5).long().expand(3, -1)}


def loss_and_gradients(model: nn.Module, batch, chunk, bf16=False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    model.loss_chunk = chunk
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = next_token_loss(model, batch)
    (loss / 3).backward()  # as inside a window of gradient accumulation: the gradient of the loss is not 1
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 7, 33, 1000])
@pytest.mark.parametrize("tie", [True, False])
def test_chunked_loss_is_the_whole_one(tiny_config, tie, chunk) -> None:
    """Value and gradients within float32's rounding: other sums, same terms."""
    torch.manual_seed(0)
    model = Transformer(replace(tiny_config, tie_embeddings=tie, init_std=0.2))
    BitNet().prepare(model)
    whole, gradients = loss_and_gradients(model, ragged_batch(), None)
    loss, found = loss_and_gradients(model, ragged_batch(), chunk)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item(), msg=name)


def test_chunked_loss_is_nearer_to_float64_than_bf16_without_chunks() -> None:
    """Under autocast the products are bf16's; chunks add up in float32, so their gradients err no more."""
    torch.manual_seed(0)
    x, targets = torch.randn(4, 64, 32), torch.randint(500, (4, 64))
    head = nn.Linear(32, 500, bias=False)

    def gradients(how: str) -> list[torch.Tensor]:
        dtype = torch.float64 if how == "exact" else torch.float32
        a, w = x.to(dtype, copy=True).requires_grad_(), nn.Linear(32, 500, bias=False, dtype=dtype)
        w.load_state_dict(head.state_dict())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how != "exact"):
            if how == "chunks":
                total = chunked_nats(a, w, targets, 48)
            else:
                logits = w(a).to(torch.promote_types(dtype, torch.float32))
                total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        (total / 256).backward()
        assert a.grad.dtype == w.weight.grad.dtype == dtype
        return [a.grad, w.weight.grad]

    exact, whole, chunks = gradients("exact"), gradients("whole"), gradients("chunks")
    for truth, plain, found in zip(exact, whole, chunks, strict=True):
        error = (found - truth).norm() / truth.norm()
        assert 1e-4 < error < 5e-3  # bf16 products, not float32's
        assert error < 1.05 * (plain - truth).norm() / truth.norm()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 has another implementation")
def test_chunked_loss_equals_torchs_own() -> None:
    torch.manual_seed(0)
    x, head, targets = torch.randn(1, 50, 16), nn.Linear(16, 300, bias=False), torch.randint(300, (1, 50))
    targets[0, ::7] = IGNORE
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    total = chunked_nats(ours, head, targets, 16)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    reference = F.linear_cross_entropy(theirs[0], head.weight, targets[0], reduction="sum", options=options)
    torch.testing.assert_close(total, reference)
    for a, b in zip(
        torch.autograd.grad(total, (ours, head.weight)),
        torch.autograd.grad(reference, (theirs, head.weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_chunks_when_nothing_is_counted_and_where_nothing_is_trained(tiny_config) -> None:
    model, batch = Transformer(tiny_config), ragged_batch()
    nothing = {**batch, "targets": torch.full_like(batch["targets"], IGNORE)}
    loss, gradients = loss_and_gradients(model, nothing, 7)
    assert loss == 0 and all(not g.any() for g in gradients.values())
    model.tok_embeddings.requires_grad_(False)  # and with it the head
    _, gradients = loss_and_gradients(model, batch, 7)
    _, whole = loss_and_gradients(model, batch, None)
    assert "tok_embeddings.weight" not in gradients and gradients.keys() == whole.keys()
    assert all(torch.allclose(gradients[n], whole[n], atol=1e-6) for n in whole)


def test_scores_by_chunks(tiny_config) -> None:
    """Validation holds no more logits than training does."""
    model, batch = Transformer(tiny_config).eval(), ragged_batch()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[-2]))
    whole = score(model, [batch], torch.ones(97))
    model.loss_chunk = 10
    chunked = score(model, [batch], torch.ones(97))
    assert seen == [11, 10, 10, 10, 3] and chunked.tokens == whole.tokens
    assert chunked.nats == pytest.approx(whole.nats, rel=1e-6)


def test_backward_of_a_chunked_loss_works_once(tiny_config) -> None:
    model = Transformer(tiny_config)
    model.loss_chunk = 7
    loss = next_token_loss(model, ragged_batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward works once"):
        loss.backward()


PEAK = """
import json, sys, torch
from pathlib import Path
from bitnet.loss import chunked_nats
chunk, tokens, vocabulary = int(sys.argv[1]), 1024, 32000
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
def step(tokens, vocabulary):
    x, head = torch.randn(1, tokens, 128, requires_grad=True), torch.nn.Linear(128, vocabulary, bias=False)
    targets = torch.randint(vocabulary, (1, tokens))
    if chunk:
        loss = chunked_nats(x, head, targets, chunk)
    else:
        loss = torch.nn.functional.cross_entropy(head(x)[0], targets[0], reduction="sum")
    loss.backward()
step(8, 16)
before = peak()
step(tokens, vocabulary)
print(json.dumps((peak() - before) / (tokens * vocabulary * 4)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak resident set as Linux reports it")
def test_peak_memory_of_a_large_vocabulary() -> None:
    """In units of one float32 tensor of all logits: without chunks at least two are alive, with them a third of one."""

    def peak(chunk: int) -> float:
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # memory goes back at once
        command = [sys.executable, "-c", PEAK, str(chunk)]
        return float(json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout))

    # The head and its gradient, 2 x 32000 x 128, are a quarter; a chunk of 64 tokens with its gradients an eighth.
    assert peak(64) < 0.5 and peak(0) > 2.0
