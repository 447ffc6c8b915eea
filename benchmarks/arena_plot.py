"""How far low-bit models are behind their float twins, drawn from tables that ``arena.py --out`` has written.

    python benchmarks/arena_plot.py benchmarks/results/arena_s_cpu_2026-11-23.json ... --out docs/images/arenas.svg

A panel for each file, with the plain recipe and ours for ternary and binary weights: a bar for the mean, a dot for each
seed.
"""

import argparse
import json
import statistics
from pathlib import Path

from arena import gaps
from matplotlib.figure import Figure

COLOURS = {"plain": "0.75", "our": "C0"}


def title(table: dict, name: str) -> str:
    """Which arena, and how long each run was."""
    seeds = max(len(runs) for runs in table["rows"].values())
    return f"Arena {name.split('_')[1].upper()} ({seeds} {'seed' if seeds == 1 else 'seeds'})"


def plot(files: list[Path], out: Path) -> None:
    figure = Figure(figsize=(4 * len(files) + 1, 2.6), layout="constrained")
    panels = figure.subplots(1, len(files), sharex=True, sharey=True, squeeze=False)[0]
    for panel, file in zip(panels, files, strict=True):
        table = json.loads(file.read_text(encoding="utf-8"))
        found = {name: of_row for name, of_row in gaps(table["rows"]).items() if of_row and name != "float"}
        for name, of_row in found.items():
            mean = statistics.mean(of_row)
            panel.barh(name, mean, color=COLOURS[name.split()[0]], zorder=1)
            panel.plot(of_row, [name] * len(of_row), "k.", markersize=4, zorder=2)
            panel.annotate(f"{mean:.3f}", (max(of_row), name), (5, 0), textcoords="offset points", va="center")
        panel.set(title=title(table, file.stem), xlabel="nats per token behind float", xmargin=0.2)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+", help="JSON files of arena.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plot(args.tables, args.out)


if __name__ == "__main__":
    main()
