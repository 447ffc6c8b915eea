"""The results of a sweep: a table of grid points, and validation loss over the first numeric key as a plot."""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bitnet.progress import TableConsole
from bitnet.training.sweep import Axis, Settings, Sweep, figures

FIGURES = {"val/loss": "validation loss", "val/bpb": "bits per byte", "perf/tokens_per_s": "tokens/s"}


@dataclass(frozen=True)
class Point:
    """A grid point with the figures of its finished runs, by seed."""

    settings: Settings
    runs: dict[int, dict[str, float]]

    def values(self, tag: str) -> list[float]:
        return [run[tag] for run in self.runs.values() if tag in run]

    def mean(self, tag: str) -> float | None:
        values = self.values(tag)
        return float(np.mean(values)) if values else None

    def sd(self, tag: str) -> float | None:
        """Of the sample, with n - 1; None for fewer than two runs."""
        values = self.values(tag)
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


def read_points(sweep: Sweep) -> list[Point]:
    points = []
    for settings in sweep.points:
        found = {seed: figures(sweep.run_of(settings, seed)) for seed in range(sweep.seeds)}
        runs = {seed: run for seed, run in found.items() if run and "val/loss" in run}
        points.append(Point(settings, runs))
    return points


def best_of(points: list[Point]) -> Point | None:
    """Fewest bits per byte, which also compares tokenizers. A point must not win by losing its worst seed, so only
    those with the most finished runs take part."""
    most = max(len(point.runs) for point in points)
    return min((p for p in points if len(p.runs) == most), key=lambda p: p.mean("val/bpb") or np.inf) if most else None


def cells(point: Point, seeds: int) -> list[str]:
    """One row of the table, as text."""
    texts = [*point.settings.values(), f"{len(point.runs)} of {seeds}"]
    for tag in FIGURES:
        mean, sd, digits = point.mean(tag), point.sd(tag), 0 if tag == "perf/tokens_per_s" else 4
        spread = f" ± {sd:,.{digits}f}" if sd is not None else ""
        texts.append("-" if mean is None else f"{mean:,.{digits}f}{spread}")
    return texts


def write_report(sweep: Sweep, errors: dict[str, str]) -> None:
    """Print the table; write sweep.json, sweep.md and sweep.png."""
    points = read_points(sweep)
    best = best_of(points)
    columns = [*sweep.short.values(), "runs", *FIGURES.values(), ""]
    rows = [[*cells(point, sweep.seeds), "best" if point is best else ""] for point in points]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < len(sweep.short) else "right")
    for row in rows:
        table.add_row(*row, style="bold" if row[-1] else None)
    console = TableConsole(width=140)
    console.print(table)
    texts = {run.folder.name: run.text for run in sweep.runs}
    failures = [f"failed: {texts[name]}: {error}" for name, error in errors.items()]
    for line in failures:
        console.print(line, markup=False, soft_wrap=True)
    if best:
        plot(sweep, points, sweep.out / "sweep.png")
    (sweep.out / "sweep.md").write_text(_markdown(sweep, columns, rows, failures, best is not None), encoding="utf-8")
    (sweep.out / "sweep.json").write_text(json.dumps(_as_json(sweep, points, best, errors), indent=1) + "\n")
    names = "sweep.md, sweep.json and sweep.png" if best else "sweep.md and sweep.json"
    console.print(f"{sweep.out}/ has {names}", markup=False, soft_wrap=True)


def _markdown(sweep: Sweep, columns: list[str], rows: list[list[str]], failures: list[str], plotted: bool) -> str:
    lines = [f"# Sweep of {sweep.config}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    lines += ["", *(["![Validation loss of every run](sweep.png)", ""] if plotted else [])]
    notes = ["Mean ± standard deviation (n - 1) over seeds, at the end of each run."]
    notes += [f"Options of every run: `{' '.join(sweep.options)}`"] if sweep.options else []
    return "\n".join([*lines, *(f"- {note}" for note in [*notes, *failures])]) + "\n"


def _as_json(sweep: Sweep, points: list[Point], best: Point | None, errors: dict[str, str]) -> dict[str, Any]:
    rows = []
    for point in points:
        row: dict[str, Any] = {"settings": point.settings, "best": point is best}
        for tag in FIGURES:
            row[tag] = {"mean": point.mean(tag), "sd": point.sd(tag)}
        row["runs"] = [
            {"seed": seed, "folder": sweep.run_of(point.settings, seed).folder.name, **{t: run.get(t) for t in FIGURES}}
            for seed, run in point.runs.items()
        ]
        rows.append(row)
    return {
        "config": sweep.config, "options": list(sweep.options), "seeds": sweep.seeds, "points": rows, "failed": errors,
    }  # fmt: skip


def numbers(axis: Axis) -> list[float] | None:
    """The values of the first key of an axis whose values are all different numbers."""
    for texts in zip(*axis.values, strict=True):
        try:
            found = [float(text) for text in texts]
        except ValueError:
            continue
        if len(set(found)) == len(found) and bool(np.isfinite(found).all()):
            return found
    return None


def is_geometric(values: list[float]) -> bool:
    """Whether the steps between the values are more even on a log axis than on a plain one."""
    if len(values) < 3 or min(values) <= 0:
        return False

    def unevenness(steps: Any) -> float:
        return float(np.std(steps) / np.mean(steps))

    ordered = np.sort(values)
    return unevenness(np.diff(np.log(ordered))) < unevenness(np.diff(ordered))


def plot(sweep: Sweep, points: list[Point], file: Path) -> None:
    """Every run as a dot, means joined by a line for each combination of the other axes. Without a numeric axis the
    first one is drawn as names."""
    from matplotlib.figure import Figure

    axis = next((axis for axis in sweep.axes if numbers(axis)), sweep.axes[0])
    found = numbers(axis)
    places = found or [float(number) for number in range(len(axis.values))]
    place = dict(zip(axis.values, places, strict=True))
    lines: dict[str, list[tuple[float, Point]]] = {}
    for point in points:
        label = ", ".join(f"{sweep.short[k]} {v}" for k, v in point.settings.items() if k not in axis.keys)
        x = place[tuple(point.settings[key] for key in axis.keys)]
        if point.runs:
            lines.setdefault(label, []).append((x, point))
    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, (label, line) in enumerate(lines.items()):
        color, marker = f"C{number % 10}", "os^Dv<>Pp*Xhd"[number % 13]
        line.sort(key=lambda pair: pair[0])
        means = [(x, float(np.mean(point.values("val/loss")))) for x, point in line]
        dots = [(x, value) for x, point in line for value in point.values("val/loss")]
        style: dict[str, Any] = {
            "linestyle": "-" if found else "none",
            "linewidth": 1.2,
            "marker": "_",
            "markersize": 14,
        }
        axes.plot(*zip(*means, strict=True), color=color, **style)
        axes.plot(*zip(*dots, strict=True), marker, color=color, alpha=0.6, markersize=5, label=label)
    if found and is_geometric(found):
        axes.set_xscale("log")
        axes.minorticks_off()
    names = axis.choices if len(axis.choices[0]) < 16 else [choice.replace("+", "\n") for choice in axis.choices]
    axes.set_xticks(places, names)
    if max(len(line) for name in names for line in name.split("\n")) * len(names) > 60:
        axes.tick_params("x", rotation=30)
    seeds = f"{sweep.seeds} seeds, mean and each run" if sweep.seeds > 1 else "one seed"
    keys = axis.keys if len(axis.keys) < 3 else tuple(sweep.short[key] for key in axis.keys)
    axes.set(
        xlabel=textwrap.fill(" + ".join(keys), 80),
        ylabel="validation loss, nats per token",
        title=f"{sweep.config}: {seeds}",
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if any(lines):
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(file)
