"""Laws of several sizes against laws that the points were made by."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bitnet.comparison.compare import Row
from bitnet.comparison.cost import Cost
from bitnet.comparison.ladder import Laws, describe, fit_laws, ladders, plot_ladders

SIZES = (1e5, 3e5, 1e6, 4e6)


def row(method: str, weights: float, loss: float, bits: float) -> Row:
    return Row(
        name=f"{method}-{weights:g}", method=method, parameters=int(weights * 1.2), linear_parameters=int(weights),
        bits_per_parameter=bits, file_bytes=int(weights * bits / 8), bits_per_byte=loss, interval=(loss, loss),
        difference=None, perplexity=1.0, decode_tokens_per_s=1.0, prefill_tokens_per_s=1.0, memory_mb=1.0,
        own=Cost(tokens=int(weights), seconds=1.0, flops=1.0), parents=None,
    )  # fmt: skip


def rows() -> list[Row]:
    """Float: 20 N^-0.25 + 1; ternary: 26 N^-0.25 + 1.05, with an eighth of the bits."""
    float_ = [row("float", n, 20 * n**-0.25 + 1, 16) for n in SIZES]
    return float_ + [row("W1.58A8", n, 26 * n**-0.25 + 1.05, 2) for n in SIZES]


def test_laws_are_found_again() -> None:
    laws = fit_laws({m: [(n, a * n**-0.25 + c) for n in SIZES] for m, a, c in (("f", 20, 1), ("t", 26, 1.05))})
    assert laws.exponent == pytest.approx(0.25, rel=0.02)
    assert laws.error < 2e-3
    for method, a, c in (("f", 20, 1), ("t", 26, 1.05)):
        np.testing.assert_allclose(laws(method, SIZES), [a * n**-0.25 + c for n in SIZES], atol=3e-3)
    assert laws.crossing("f", "t") is None  # more of both: never
    assert (
        Laws(exponent=0.02, terms={"f": (1.0, 1e-7), "t": (2.0, 0.0)}, error=0.0).crossing("f", "t") is None
    )  # beyond any float


def test_where_two_laws_cross() -> None:
    points = {"f": [(n, 2 * n**-0.5 + 1) for n in (1, 4, 16, 64)], "t": [(n, n**-0.5 + 1.25) for n in (1, 4, 16, 64)]}
    assert fit_laws(points).crossing("f", "t") == pytest.approx(16, rel=0.05)  # n^-0.5 = 1 / 4


def test_noise_moves_the_curve_little() -> None:
    noise = np.random.default_rng(0).normal(0, 0.003, 8)
    points = [(n, 20 * n**-0.25 + 1) for n in SIZES]
    noisy = fit_laws({"f": [(n, y + e) for (n, y), e in zip(points, noise, strict=False)]})
    np.testing.assert_allclose(noisy("f", SIZES), [y for _, y in points], atol=0.01)


@pytest.mark.parametrize("y", [(2.1, 2.0, 1.87, 1.5), (1.0, 1.1, 1.2, 1.4), (3.0, 2.2, 1.9, 1.8)])
def test_no_law_foresees_less_than_nothing(y) -> None:
    """Losses that fall ever faster, that rise, and as usual, against scipy's non-negative least squares."""
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    laws = fit_laws({"f": list(zip(SIZES, y, strict=True))})
    design = np.stack([np.array(SIZES) ** -laws.exponent, np.ones(4)], axis=1)
    wanted, norm = optimize.nnls(design, np.array(y))
    np.testing.assert_allclose(laws.terms["f"], wanted, rtol=1e-6, atol=1e-12)
    assert laws.error == pytest.approx(norm / 2)


def test_a_report_says_the_laws_and_draws_them(tmp_path: Path) -> None:
    found = describe(rows())
    assert len(found) == 4
    assert "float: 20" in found[0] or "float: 19" in found[0] or "float: 21" in found[0]
    assert "W1.58A8 and float never meet." in found[1]
    assert "against bits of all tensors" in found[2]
    (file,) = plot_ladders(rows(), tmp_path)
    assert file.read_text().count("training tokens") >= 1


def test_a_tokenizer_in_the_file_of_one_method_moves_no_law() -> None:
    """A packed file holds its tokenizer, a file of float weights does not: only tensors are compared."""
    float_, ternary = rows()[:4], rows()[4:]
    padded = [dataclasses.replace(r, file_bytes=r.file_bytes + 118_000) for r in ternary]
    assert describe([*float_, *padded]) == describe(rows())
    assert ladders(rows(), "bits")["W1.58A8"][0][0] == 2 * 1.2e5


def test_points_that_say_nothing_have_no_law(tmp_path: Path) -> None:
    """Three models of one method fit any law of three numbers; losses that rise with the size fit none."""
    three = rows()[:3]
    assert describe(three)[0].endswith("no law (3 models fit any law of 3 numbers; one more size would tell).")
    assert len(plot_ladders(three, tmp_path)) == 1
    rising = [dataclasses.replace(r, bits_per_byte=loss) for r, loss in zip(rows(), (1, 1.1, 1.2, 1.4), strict=False)]
    assert describe(rising) == [
        f"Bits per byte against {what}: no law (they lie on no power law)."
        for what in ("weights of the blocks", "bits of all tensors")
    ]


def test_too_few_sizes_have_no_law(tmp_path: Path) -> None:
    few = [r for r in rows() if r.linear_parameters < 5e5]
    assert describe(few) == [] and plot_ladders(few, tmp_path) == []
    mixed = [*rows(), row("W1A8", 1e5, 2.0, 1)]
    assert set(ladders(mixed, "parameters")) == {"float", "W1.58A8"}
