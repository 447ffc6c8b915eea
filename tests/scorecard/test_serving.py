"""N6 to N8: every path computes the same bits, alone or in a batch, while training and served."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bitnet.checkpoint import load_checkpoint
from bitnet.generation import Sampling, generate_tokens
from bitnet.inference.packed_linear import PackedLinear
from bitnet.inference.packing import pack
from bitnet.layers import BitLinear, low_bit_layers
from bitnet_kernels import FORMATS
from bitnet_kernels.cpu import native
from bitnet_kernels.reference import packed_matmul_reference
from tests.inference.conftest import low_bit_model
from tests.kernels.conftest import random_int8, random_levels

GREEDY = Sampling(temperature=0.0)
RESIDENT = ["ternary2", "binary1"]


def triton_paths() -> dict[str, Callable[..., torch.Tensor]]:
    """The Triton kernel, interpreted, with inline PTX evaluated and without; none where triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return {}
    from bitnet_kernels import triton_matmul
    from bitnet_kernels.configurations import Tile
    from tests.kernels import ptx_evaluator

    ptx_evaluator.install()
    tile = Tile(16, 16, 64)

    def path(asm: bool) -> Callable[..., torch.Tensor]:
        return lambda x, packed, format, n, k: triton_matmul.packed_matmul(x, packed, format, n, k, tile=tile, asm=asm)

    return {"triton, PTX": path(True), "triton, plain": path(False)}


def native_path(isa: native.Isa) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, packed: torch.Tensor, format: str, n: int, k: int) -> torch.Tensor:
        return native.packed_matmul(x, packed, FORMATS[format].planes, k, None, None, isa=isa)

    return run


@pytest.mark.slow
@pytest.mark.check("N6", "every code path of this machine has the bits of the reference", 400)
def test_paths(tally, capsys) -> None:
    best = native.best_isa()
    here = [isa for isa in native.Isa if isa <= best and (isa == native.Isa.NEON) == (best == native.Isa.NEON)]
    here = sorted({native.Isa.PORTABLE, *here})
    paths = {isa.name: native_path(isa) for isa in here} | triton_paths()
    skipped = [isa.name for isa in native.Isa if isa not in here] + ([] if "triton, PTX" in paths else ["triton"])
    ran = dict.fromkeys(paths, 0)
    choose = np.random.default_rng(0)
    for trial in range(200):
        m, n, k = (int(choose.integers(*ends)) for ends in ((1, 10), (1, 20), (1, 301)))
        format = RESIDENT[trial % 2]
        x, w = random_int8(m, k, trial), random_levels(format, n, k, trial)
        packed = FORMATS[format].pack(w)
        wanted = packed_matmul_reference(x, packed, format, k)
        assert np.array_equal(wanted.numpy(), x.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T)
        for name, path in paths.items():
            tally(torch.equal(path(x, packed, format, n, k), wanted), f"{name}: {m} x {n} x {k} {format}")
            ran[name] += 1
    with capsys.disabled():
        print(f"\nN6 paths: {ran}; not on this machine: {', '.join(skipped) or 'none'}")
    assert set(ran.values()) == {200}


def rows_alone(layer: nn.Module, x: torch.Tensor) -> bool:
    batch = layer(x)
    return all(torch.equal(layer(x[i : i + 1])[0], batch[i]) for i in range(len(x)))


@pytest.mark.check("N7", "a row of a batch has the bits of the row alone", 96)
@torch.inference_mode()
def test_batches(tally) -> None:
    for trial, (n, k) in enumerate(((48, 96), (65, 700), (33, 257), (128, 256))):
        for kind in ("ternary", "binary"):
            torch.manual_seed(trial)
            layer = BitLinear(k, n, bias=False, weight_kind=kind, act_bits=8).eval()
            packed = PackedLinear.from_bit_linear(layer)
            for size in range(1, 9):
                x = torch.randn(size, k)
                held = rows_alone(layer, x) and rows_alone(packed, x) and torch.equal(layer(x), packed(x))
                tally(held, f"{kind} {n} x {k}, {size} rows")
    for size in range(1, 9):
        for model in (pack(low_bit_model()), pack(low_bit_model(weight="binary"))):
            ids = torch.randint(97, (size, 20), generator=torch.Generator().manual_seed(size))
            batch = model(ids).double().log_softmax(-1)
            alone = torch.cat([model(row[None]) for row in ids]).double().log_softmax(-1)
            kl = float((batch.exp() * (batch - alone)).sum(-1).mean())  # attention sums in another order
            tally(abs(kl) < 1e-4, f"the whole model, {size} rows: KL {kl}")
        model = low_bit_model(recipe={"scale_per": "row"})
        layers = low_bit_layers(model)
        name = list(layers)[size % len(layers)]
        tally(rows_alone(layers[name], torch.randn(size, layers[name].in_features)), f"{name}, a scale per row")
        tally(rows_alone(PackedLinear.from_bit_linear(layers[name]), torch.randn(size, layers[name].in_features)), name)


RUNS = {
    "ternary": ["--model.recipe.weight=ternary"],
    "binary": ["--model.recipe.weight=binary"],
    "four bits": ["--model.recipe.act_bits=4"],
    "relu2": ["--model.config.activation=relu2", "--model.config.sub_norm=false"],
    "rows": ["--model.recipe.scale_per=row"],
}
TOKENS = 1000


def uncached(model: nn.Module, ids: list[int]) -> list[int]:
    context = torch.tensor([ids])
    for _ in range(TOKENS):
        context = torch.cat([context, model(context, last_only=True)[:, -1:].argmax(-1)], dim=1)
    return context[0, len(ids) :].tolist()


@pytest.mark.slow
@pytest.mark.check("N8", "a trained model and its packed form write the same tokens, with equal logits", 25)
@torch.inference_mode()
def test_trained_models(stories: Path, tmp_path: Path, run_fit: Callable[..., None], tally) -> None:
    for kind, options in RUNS.items():
        with torch.inference_mode(False):
            run_fit(stories, tmp_path / kind, "--trainer.max_steps=60", "--model.optim.lr=1e-2", *options)
        trained, _ = load_checkpoint(tmp_path / kind)
        trained.config = replace(trained.config, max_seq_len=TOKENS + 100)
        packed, start = pack(trained), [5, 6, 7]
        ids = torch.randint(trained.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
        full = packed(ids)
        tally(torch.equal(trained(ids), full), f"{kind}: logits")
        written = [list(generate_tokens(model, start, TOKENS, GREEDY)) for model in (trained, packed)]
        tally(len(written[0]) == TOKENS and written[0] == written[1], f"{kind}: {TOKENS} tokens, cached")
        tally(uncached(trained, start) == uncached(packed, start), f"{kind}: {TOKENS} tokens, not cached")
        cache = packed.new_cache(4)
        steps = torch.cat([packed(ids[:, t : t + 1], cache) for t in range(ids.shape[1])], dim=1)
        p, q = full.double().log_softmax(-1), steps.double().log_softmax(-1)
        kl, same = float((p.exp() * (p - q)).sum(-1).mean()), float((p.argmax(-1) == q.argmax(-1)).double().mean())
        tally(kl < 1e-4 and same >= 0.99, f"{kind}: cached against whole, KL {kl}, argmax {same}")
        held = True
        for layer in low_bit_layers(trained).values():
            x, served = torch.randn(8, layer.in_features), PackedLinear.from_bit_linear(layer)
            held = held and rows_alone(served, x) and torch.equal(served(x), layer(x))
        tally(held, f"{kind}: linear layers, row by row")
