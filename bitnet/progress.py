"""Consoles, and progress of work outside the training loop, in a terminal and elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class TableConsole(Console):
    """Stdout for the tables of a command, ``width`` columns wide.

    A reader that goes, as ``head`` does, is a ``BrokenPipeError``, as it is for ``print``; rich would exit with 1.
    """

    def __init__(self, width: int) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, width=width)  # values may stand in brackets

    def on_broken_pipe(self) -> None:
        raise  # what rich is handling just now


def run_console() -> Console:
    """The console of a run; wide enough for a line of figures where there is no terminal to ask."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


class PreparationProgress:
    """Progress of work in named stages (reading text, calibrating): a bar in a terminal, else one line per stage."""

    def __init__(self) -> None:
        self._label = ""
        self._bar: Progress | None = None
        self._task: Any = None

    def __call__(self, label: str, done: int, total: int) -> None:
        console = run_console()
        if label != self._label:
            self._close()
            self._label = label
            if console.is_terminal and total > 0:
                columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
                self._bar = Progress(*columns, console=console, transient=True)
                self._task = self._bar.add_task(label, total=total)
                self._bar.start()
            else:
                console.print(f"{label} ...", style="dim")
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        if total and done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
