"""TensorBoard's first page: what matters about a run, in one group of cards that is open when the page opens.

TensorBoard sorts groups by name and opens the first two. The figures that matter are therefore written a second time,
under ``overview/``, next to the sample text as a picture (the first page shows pictures, but no text).
"""

from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

OVERVIEW = {
    "train/loss": "overview/train_loss",
    "val/loss": "overview/val_loss",
    "val/bpb": "overview/val_bits_per_byte",
    "quant/zero_fraction": "overview/zero_fraction",
    "quant/flip_rate": "overview/flip_rate",
    "perf/tokens_per_s": "overview/tokens_per_s",
}
SAMPLE = "overview/sample_text"

CUSTOM_SCALARS = {
    "run": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "bits per byte": ["Multiline", ["train/bpb", "val/bpb"]],
        "zero fraction": ["Multiline", ["quant/zero_fraction"]],
        "flip rate": ["Multiline", ["quant/flip_rate"]],
        "tokens per second": ["Multiline", ["perf/tokens_per_s"]],
    }
}
"""The page "Custom scalars": training and validation in one chart."""


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger that fills the overview."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        overview = {OVERVIEW[tag]: value for tag, value in metrics.items() if tag in OVERVIEW}
        super().log_metrics({**metrics, **overview}, step)


def text_image(text: str, title: str) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Text as a picture (H, W, 3)."""
    import textwrap
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    printable = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    lines = [part for line in printable.splitlines() for part in (textwrap.wrap(line, 46) or [""])][:16]
    figure = Figure(figsize=(4.2, 3.0), dpi=120)
    canvas = FigureCanvasAgg(figure)
    body = "\n".join(lines).replace("$", r"\$")
    figure.text(0.02, 0.97, f"{title}\n\n{body}", family="monospace", fontsize=10, va="top")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a young model writes characters that no font has
        canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
