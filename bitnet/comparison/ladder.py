"""Models of several sizes: loss against parameters, bits and tokens, with power laws and where they cross.

Each method has ``loss = a x^-b + c``, a and c of 0 or more. With a few sizes three numbers a method fit anything, so
the exponent b is one for all methods (as in the laws of arXiv 2407.12327, which found one exponent for float and
ternary models).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.comparison.compare import Row

LEAST_SIZES = 3
"""Sizes of a method from which there may be a law."""
EXPONENTS = np.geomspace(0.02, 2.0, 400)
"""Those that are tried; one at either end means that the points are those of no power law."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Laws:
    """``loss = a x^-b + c`` with ``terms[method] = (a, c)``."""

    exponent: float
    terms: dict[str, tuple[float, float]]
    error: float
    """Root mean square of what the laws miss by."""

    def __call__(self, method: str, x: Any) -> Any:
        a, c = self.terms[method]
        return a * np.asarray(x, dtype=np.float64) ** -self.exponent + c

    def crossing(self, one: str, other: str) -> float | None:
        """The x at which both have the same loss, or ``None`` if there is none."""
        (a, c), (a2, c2) = self.terms[one], self.terms[other]
        ratio = (c2 - c) / (a - a2) if a != a2 else -1.0
        with np.errstate(over="ignore"):
            at = float(np.float64(ratio) ** (-1 / self.exponent)) if ratio > 0 else np.inf
        return at if np.isfinite(at) else None


def _not_negative(f: Any, y: Any) -> tuple[float, float]:
    """Least squares of ``a f + c`` to ``y`` (both 1-D) with a and c of 0 or more: no text has less than 0 bits."""
    (a, c), *_ = np.linalg.lstsq(np.stack([f, np.ones_like(f)], axis=1), y, rcond=None)
    if c < 0:
        return float(f @ y / (f @ f)), 0.0
    return (float(a), float(c)) if a >= 0 else (0.0, float(y.mean()))


def fit_laws(points: Mapping[str, Points]) -> Laws:
    """Least squares over all methods; a and c follow from each of ``EXPONENTS`` exactly."""
    best: Laws | None = None
    for exponent in EXPONENTS:
        terms, squares, count = {}, 0.0, 0
        for method, of_method in points.items():
            x, y = np.array(of_method, dtype=np.float64).T
            a, c = terms[method] = _not_negative(x**-exponent, y)
            squares += float(((a * x**-exponent + c - y) ** 2).sum())
            count += len(y)
        error = math.sqrt(squares / count)
        if best is None or error < best.error:
            best = Laws(exponent=float(exponent), terms=terms, error=error)
    assert best is not None
    return best


def why_no_law(points: Mapping[str, Points]) -> str | None:
    """Why ``fit_laws`` would fit these, and still say nothing; None where it does say something."""
    count, numbers = sum(len(of_method) for of_method in points.values()), 2 * len(points) + 1
    if count <= numbers:
        return f"{count} models fit any law of {numbers} numbers; one more size would tell"
    if fit_laws(points).exponent in (EXPONENTS[0], EXPONENTS[-1]):
        return "they lie on no power law"
    return None


AXES: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "parameters": ("weights of the blocks", lambda row: row.linear_parameters),
    # No file sizes: a packed file holds its tokenizer, too, one of float weights does not.
    "bits": ("bits of all tensors", lambda row: row.bits_per_parameter * row.parameters),
    "tokens": ("training tokens", lambda row: None if row.own is None else row.own.tokens),
}


def ladders(rows: Sequence[Row], axis: str) -> dict[str, list[tuple[float, float]]]:
    """``(x, bits per byte)`` by method, for the methods that have enough different x."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if x := AXES[axis][1](row):
            found.setdefault(row.method, []).append((float(x), row.bits_per_byte))
    return {m: sorted(points) for m, points in found.items() if len({x for x, _ in points}) >= LEAST_SIZES}


def describe(rows: Sequence[Row]) -> list[str]:
    """The laws and their crossings in words; an empty list where there are too few sizes."""
    lines = []
    for axis in ("parameters", "bits"):
        points = ladders(rows, axis)
        if not points:
            continue
        if why := why_no_law(points):
            lines.append(f"Bits per byte against {AXES[axis][0]}: no law ({why}).")
            continue
        laws = fit_laws(points)
        said = "; ".join(f"{m}: {a:.4g} x^-{laws.exponent:.3f} + {c:.4f}" for m, (a, c) in laws.terms.items())
        lines.append(f"Bits per byte against {AXES[axis][0]}: {said} (off by {laws.error:.4f}).")
        first = rows[0].method
        for method in points:
            if method == first or first not in points:
                continue
            at = laws.crossing(first, method)
            seen = [x for p in (points[first], points[method]) for x, _ in p]
            meet = "never meet" if at is None else f"meet at {at:.3g}"
            beyond = at is not None and not min(seen) <= at <= max(seen)
            lines.append(f"By these laws {method} and {first} {meet}{', beyond what was measured' if beyond else ''}.")
    return lines


def plot_ladders(rows: Sequence[Row], folder: Path) -> list[Path]:
    """ladder.svg: a panel for each axis that has laws, its points and its curves."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    shown = {axis: points for axis in AXES if (points := ladders(rows, axis))}
    if not shown:
        return []
    methods = sorted({m for points in shown.values() for m in points})
    figure = Figure(figsize=(3.4 * len(shown) + 1.6, 3.8), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, (axis, points) in zip(panels, shown.items(), strict=True):
        laws = None if axis == "tokens" or why_no_law(points) else fit_laws(points)
        for method, of_method in points.items():
            number = methods.index(method)
            x, y = zip(*of_method, strict=True)
            panel.plot(x, y, "os^Dv<>P"[number % 8], color=f"C{number}", label=method)
            if laws is not None:
                curve = np.geomspace(min(x), max(x), 60)
                panel.plot(curve, laws(method, curve), color=f"C{number}", linewidth=1)
        panel.set(xscale="log", xlabel=AXES[axis][0])
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("bits per byte (lower is better)")
    labels = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(list(labels.values()), list(labels), loc="outside upper center", ncols=4, frameon=False)
    file = folder / "ladder.svg"
    figure.savefig(file)
    return [file]
