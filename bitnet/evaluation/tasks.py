"""Tasks of lm-eval on a model of this library, without a network where the data is at hand.

A task is one of three things:

* a name that lm-eval knows (``arc_easy``); its data set is then downloaded, unless ``data`` has it;
* a ``.yaml`` file with a task of lm-eval;
* a ``.jsonl`` file, one item a line, of which the fields say what is asked::

    query, choices, gold                 which of the choices continues "query Answer:"
    context, continuation                is the continuation what the model would say?
    context_options, continuation, gold  after which of the contexts is the continuation likelier?
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bitnet.errors import UserError
from bitnet.evaluation.lm import BitNetLM
from bitnet.evaluation.published import Published, of_the_same_size

MEAN = {"aggregation": "mean", "higher_is_better": True}
CHOICE_METRICS = [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}]
BY_FIELDS: dict[frozenset[str], dict[str, Any]] = {
    frozenset({"query", "choices", "gold"}): {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query.strip()}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": CHOICE_METRICS,
    },
    frozenset({"context", "continuation"}): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **MEAN},
        ],
    },
    frozenset({"context_options", "continuation", "gold"}): {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "{{context_options}}",
        "doc_to_target": "{{continuation}}",
        "metric_list": CHOICE_METRICS[:1],
    },
}


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task; ``acc`` and ``acc_norm`` are fractions."""

    task: str
    metric: str
    value: float
    stderr: float | None
    items: int


def _fault(item: Any, fields: frozenset[str]) -> str | None:
    """What is wrong with an item that should have ``fields``, or ``None``."""
    if not isinstance(item, dict):
        return "is no JSON object"
    if lacking := sorted(fields - set(item)):
        return f"has no {lacking[0]}"
    options = next((name for name in ("choices", "context_options") if name in fields), None)
    for name in sorted(fields - {"gold", options}):
        if not isinstance(item[name], str):
            return f"{name} = {str(item[name])[:50]}: must be a text"
    if options is None:
        return None
    texts, gold = item[options], item["gold"]
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        return f"{options} = {str(texts)[:50]}: must be a list of texts"
    if type(gold) is not int or not 0 <= gold < len(texts):
        return f"gold = {str(gold)[:50]}: must be the number of one of the {len(texts)} {options}, counted from 0"
    return None


def task_of_lines(file: Path) -> dict[str, Any]:
    """lm-eval's description of a .jsonl file. Raises ``UserError`` for the first line that is no item."""
    known = fields = None
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    item = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{file}: line {number} is no JSON object ({error}).") from error
                if fields is None:
                    fields = frozenset(item) if isinstance(item, dict) else frozenset()
                    known = next((form for form in BY_FIELDS if form <= fields), None)
                    if known is None and isinstance(item, dict):
                        forms = "; ".join(", ".join(sorted(form)) for form in BY_FIELDS)
                        raise UserError(
                            f"{file}: its fields are {', '.join(sorted(fields))}; a task has one of: {forms}."
                        )
                if fault := _fault(item, known or frozenset()):
                    raise UserError(f"{file}: line {number} {fault}.")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}).") from error
    if known is None:
        raise UserError(f"{file}: no JSON object in it; write one item a line.")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    return {"task": file.stem, **data, **BY_FIELDS[known], "metadata": {"version": 1}}


def check_names(found: list[str | dict[str, Any]]) -> None:
    """Refuse two tasks of one name: lm-eval would run the last of them only."""
    names = [task["task"] if isinstance(task, dict) else task for task in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--tasks: {names.count(name)} tasks are called {name}; rename one, or run them by turns.")


def find_task(name: str, data: Path | None) -> str | dict[str, Any]:
    """What lm-eval takes for ``name``: a name of its own, or a description."""
    if name.endswith((".yaml", ".yml", ".jsonl")):
        file = Path(name)
        if not file.is_file():
            raise UserError(f"--tasks {name}: no such file.")
        return task_of_lines(file) if file.suffix == ".jsonl" else name
    if data is not None:
        if not data.is_dir():
            raise UserError(f"--tasks_data {data}: no such folder.")
        found = [data / f"{name}.jsonl"] if (data / f"{name}.jsonl").is_file() else sorted(data.glob(f"{name}_*.jsonl"))
        if len(found) != 1:
            have = ", ".join(sorted(file.stem for file in data.glob("*.jsonl"))) or "nothing"
            raise UserError(f"--tasks {name}: not in {data}, which has {have}.")
        return task_of_lines(found[0])
    return name


@contextlib.contextmanager
def _quiet() -> Any:
    """lm-eval and datasets talk a lot; what matters is raised."""
    import datasets
    from lm_eval import evaluator

    # It asks git for the commit of the current folder, and git complains aloud where that is no repository.
    ask_git, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        evaluator.get_git_commit_hash = ask_git
        logging.disable(logging.NOTSET)
        datasets.enable_progress_bars()


def run_tasks(
    lm: BitNetLM,
    names: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
) -> list[TaskScore]:
    """Scores of ``lm`` on each task, the first ``limit`` items of each. Raises ``UserError`` for what cannot be run."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = [find_task(name, data) for name in names]
    check_names(tasks)
    built_in = any(isinstance(task, str) and not task.endswith((".yaml", ".yml")) for task in tasks)
    try:
        with _quiet():
            found: Any = lm_eval.simple_evaluate(
                model=lm,
                tasks=tasks,
                num_fewshot=few_shot,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=TaskManager(include_defaults=built_in),
            )
    except UserError:
        raise
    except Exception as error:  # a task is somebody's YAML, templates and data: it can fail in any way
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--tasks {','.join(names)}: cannot be run ({reason}). Without a network, name .yaml or .jsonl files, or a "
            "folder of them with --tasks_data."
        ) from error
    scores = []
    for task, result in found["results"].items():
        items = found["n-samples"].get(task, {}).get("effective", 0)
        for key, value in result.items():
            metric, _, filter_ = key.partition(",")
            if filter_ and isinstance(value, float) and not metric.endswith("_stderr"):
                share = metric.startswith("acc") and items > 1
                stderr = (value * (1 - value) / (items - 1)) ** 0.5 if share else None
                name = metric if filter_ == "none" else f"{metric}, {filter_}"
                scores.append(TaskScore(task=task, metric=name, value=value, stderr=stderr, items=items))
    return scores


def table_of(scores: Sequence[TaskScore], parameters: int) -> tuple[Table, list[Published]]:
    """A table of the scores beside published ones of the same size, and whose those are."""
    others = of_the_same_size(parameters, [score.task for score in scores])
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("task", "items", "metric", "this model", *(other.name for other in others)):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for score in scores:
        percent = score.metric.startswith("acc")
        shown = f"{score.value:.1%}" if percent else f"{score.value:,.4g}"
        if score.stderr is not None and percent:
            shown += f" ± {score.stderr:.1%}"
        theirs = [
            f"{other.scores[score.task]:.1f}%" if score.metric == "acc" and score.task in other.scores else ""
            for other in others
        ]
        table.add_row(score.task, f"{score.items:,}", score.metric, shown, *theirs)
    return table, others
