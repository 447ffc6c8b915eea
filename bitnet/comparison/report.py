"""The report of ``bitnet compare``: one table and three plots, as Markdown and as one HTML file that needs no other."""

import base64
import html
import json
from pathlib import Path

from bitnet.comparison.compare import Comparison, Row
from bitnet.comparison.cost import Cost
from bitnet.comparison.ladder import describe, plot_ladders

COLUMNS = (
    "model", "method", "bits / parameter", "file", "bits / byte", "95 % interval", "against the first", "perplexity",
    "decode tok/s", "prefill tok/s", "memory", "own cost", "parents' cost",
)  # fmt: skip


def count(n: float) -> str:
    """1234567 as 1.23 M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= factor:
            return f"{n / factor:,.3g} {unit}"
    return f"{n:,.0f}"


def cost_text(cost: Cost | None) -> str:
    if cost is None:
        return "unknown"
    return f"{count(cost.tokens)} tokens, {cost.seconds:,.0f} s, {cost.flops:.2g} FLOPs"


def cells(row: Row) -> list[str]:
    """One row of the table, as text."""
    low, high = row.interval
    against = "-"
    if row.difference is not None:
        value, least, most = row.difference
        against = f"{value:+.4f} [{least:+.4f}, {most:+.4f}]"
    return [
        row.name, row.method, f"{row.bits_per_parameter:.2f}", f"{row.file_bytes / 1e6:,.2f} MB",
        f"{row.bits_per_byte:.4f}", f"{low:.4f} - {high:.4f}", against, f"{row.perplexity:,.2f}",
        f"{row.decode_tokens_per_s:,.0f}", f"{row.prefill_tokens_per_s:,.0f}", f"{row.memory_mb:,.0f} MB",
        cost_text(row.own), cost_text(row.parents) if row.parents else "-",
    ]  # fmt: skip


def notes(c: Comparison) -> list[str]:
    """How to read the table."""
    return [
        f"Text: {c.text}, {c.documents:,} documents (or pieces of a few), {c.text_bytes:,} bytes, read "
        f"{c.settings['seq_len']:,} tokens at a time.",
        "Quality is that of the stored form: packed models are scored packed, float ones rounded to bfloat16. "
        "Intervals are of the bootstrap over documents; differences draw the same documents for both models, so "
        "their intervals are narrower than those of the models.",
        "Bars in the plots are intervals of the difference from the first model.",
        "Bits count every tensor of the file: weights, scales, zero points, adapters, norms, embedding and head "
        "(16 bits, unless a model came packed otherwise).",
        f"Speed: {c.device}, {c.threads} thread{'s' if c.threads > 1 else ''}, {c.settings['tokens']} tokens after a "
        f"prompt of one, prompts of {c.settings['prompt_tokens']}; medians of {c.settings['rounds']} rounds in which "
        "the models take turns, each in a process of its own. Memory is the peak of that process over its imports.",
        "Costs are what run folders say. FLOPs count 2 per weight and forward pass, three times that in training. "
        "A model that starts from another one has cost what its parents have cost, too.",
        *describe(c.rows),
    ]


def bars(row: Row, first: Row) -> tuple[float, float]:
    """What a plot shows around a point: the interval of its difference from the first model, where that stands."""
    if row.difference is None:
        return row.bits_per_byte, row.bits_per_byte
    return first.bits_per_byte + row.difference[1], first.bits_per_byte + row.difference[2]


def plot(c: Comparison, folder: Path) -> list[Path]:
    """Bits per byte against bits per parameter, decoding speed and training tokens; returns the .svg files."""
    from matplotlib.figure import Figure

    def tokens(row: Row) -> float | None:
        return None if row.own is None else row.own.tokens + (row.parents.tokens if row.parents else 0)

    files = []
    for name, label, value in (
        ("bits", "bits per parameter, all tensors counted", lambda row: row.bits_per_parameter),
        ("speed", "tokens decoded per second", lambda row: row.decode_tokens_per_s),
        ("tokens", "training tokens, parents' included", tokens),
    ):
        shown = [(row, x) for row in c.rows if (x := value(row)) is not None]
        low, high = min((x for _, x in shown), default=1.0), max((x for _, x in shown), default=1.0)
        figure = Figure(figsize=(8.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, (row, x) in enumerate(shown):
            least, most = bars(row, c.rows[0])
            axes.errorbar(
                x, row.bits_per_byte, yerr=[[row.bits_per_byte - least], [most - row.bits_per_byte]],
                fmt="os^Dv<>Pp*Xhd"[number % 13], color=f"C{number % 10}", markersize=7, elinewidth=1, capsize=2,
                label=f"{row.name} ({row.method})",
            )  # fmt: skip
        axes.set(xlabel=label, ylabel="bits per byte (lower is better)")
        if name == "bits":
            axes.set_xscale("log", base=2)
            axes.set_xticks([x for x in (1, 2, 3, 4, 5, 6, 8, 12, 16, 32) if 0.9 * low <= x <= 1.1 * high])
            axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if shown:
            figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        files.append(folder / f"quality_by_{name}.svg")
        figure.savefig(files[-1])
    return files


def markdown(c: Comparison, plots: list[Path]) -> str:
    lines = ["# Comparison", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cells(row))} |" for row in c.rows]
    lines += ["", *(f"![{file.stem.replace('_', ' ')}]({file.name})" for file in plots), ""]
    lines += [f"- {note}" for note in notes(c)]
    return "\n".join(lines) + "\n"


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .35em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
thead th { border-bottom: 2px solid #888; }
tbody tr:first-child { background: #f4f4f4; }
img { max-width: 100%; display: block; margin: 1.5em 0; }
"""


def as_html(c: Comparison, plots: list[Path]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells(row))}</tr>\n" for row in c.rows)
    images = "".join(
        f'<img alt="{file.stem.replace("_", " ")}" '
        f'src="data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}">\n'
        for file in plots
    )
    listed = "".join(f"<li>{html.escape(note)}</li>\n" for note in notes(c))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body><h1>Comparison</h1>\n'
        f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
        f"{images}<ul>{listed}</ul></body></html>\n"
    )


def write_report(c: Comparison, folder: Path) -> None:
    """report.md, report.html, comparison.json and the plots in an existing folder."""
    plots = [*plot(c, folder), *plot_ladders(c.rows, folder)]
    (folder / "report.md").write_text(markdown(c, plots), encoding="utf-8")
    (folder / "report.html").write_text(as_html(c, plots), encoding="utf-8")
    (folder / "comparison.json").write_text(json.dumps(c.as_json(), indent=1) + "\n", encoding="utf-8")
