"""lm-eval on our models: the scores of its own Hugging Face wrapper, and equal ones for every form of a model."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from bitnet.__main__ import main
from bitnet.data.tokenizer import begin_with
from bitnet.errors import UserError
from bitnet.evaluation.lm import BitNetLM
from bitnet.evaluation.published import MODELS, of_the_same_size
from bitnet.evaluation.tasks import find_task, run_tasks, task_of_lines
from bitnet.generation import generate
from bitnet.interchange.opened import open_model

CHOICES = [
    {"query": "Question: Who ran over the hill?", "choices": ["the small dog", "a red ball", "the river"], "gold": 0},
    {"query": "Question: What did Ann find?", "choices": ["a hat", "a red ball"], "gold": 1},
    {
        "query": "Question: When are the days short?\n",
        "choices": ["in winter", "on the hill", "beside the river"],
        "gold": 0,
    },
]
WORDS = [
    {"context": "The small dog ran over the green hill and sat down beside the", "continuation": "river."},
    {"context": "A girl named Ann found a red ball in the", "continuation": "garden,"},
]
OPTIONS = [
    {
        "context_options": ["The dog was wet so the dog", "The dog was wet so the cat"],
        "continuation": "sat by the fire.",
        "gold": 0,
    },
    {
        "context_options": ["Ann was glad, so the ball", "Ann was glad, so Ann"],
        "continuation": "ran over the hill.",
        "gold": 1,
    },
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, items in (("who", CHOICES), ("lastword_a", WORDS), ("pronouns", OPTIONS)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    return folder


def forms_of(run: Path, folder: Path) -> dict[str, Path]:
    """A checkpoint, the packed file and the Hugging Face folder of one run."""
    packed, hf = folder / "m.safetensors", folder / "hf"
    assert main(["pack", str(run), "--out", str(packed)]) == 0
    assert main(["export", str(run), "--format", "hf", "--out", str(hf), "--check_tokens", "0"]) == 0
    return {"checkpoint": run, "packed": packed, "hf": hf}


@pytest.fixture(scope="module")
def forms(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return forms_of(finished_run, tmp_path_factory.mktemp("forms"))


def lm_of(path: Path, **options: object) -> BitNetLM:
    opened = open_model(path)
    return BitNetLM(opened.model, opened.tokenizer, **options)


def requests(pairs: list[tuple[str, ...]], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


PAIRS = [
    ("The small dog ran over", " the green hill"),
    ("The small dog ran over ", "the river"),
    ("", "In winter the days are short"),
    ("Where is my hat? " * 30, "nobody knew"),  # longer than the context
    ("A girl", " named Ann"),
]


def test_log_likelihoods_are_those_of_lm_evals_own_wrapper(forms) -> None:
    """transformers on the exported folder, driven by lm-eval's code, is the reference."""
    from lm_eval.models.huggingface import HFLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = HFLM(pretrained=str(forms["hf"]), dtype="auto", batch_size=1, device="cpu")
    mine = lm_of(forms["checkpoint"])
    assert mine.max_length == theirs.max_length
    for kind, pairs in (
        ("loglikelihood", PAIRS),
        ("loglikelihood_rolling", [("The days are short. " * 20,), ("Ann",)]),
    ):
        expected = getattr(theirs, kind)(requests(pairs, kind), disable_tqdm=True)
        found = getattr(mine, kind)(requests(pairs, kind))
        for a, b in zip(expected, found, strict=True):
            if kind == "loglikelihood":
                assert (b[0], b[1]) == (pytest.approx(a[0], abs=2e-4), a[1])
            else:
                assert b == pytest.approx(a, abs=2e-3)


def test_a_log_likelihood_by_hand(forms) -> None:
    """Against the logits themselves, one token at a time."""
    opened = open_model(forms["checkpoint"])
    context, said = opened.tokenizer.encode("The small").ids, opened.tokenizer.encode("The small dog").ids
    said = said[len(context) :]
    total, greedy, ids = 0.0, True, list(context)
    for token in said:
        with torch.inference_mode():
            logits = opened.model(torch.tensor([ids]))[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        ids.append(token)
    ((found, is_greedy),) = BitNetLM(opened.model, opened.tokenizer).loglikelihood(requests([("The small", " dog")]))
    assert found == pytest.approx(total, abs=1e-4) and is_greedy == greedy


def test_batches_change_nothing_but_rounding(forms) -> None:
    one = lm_of(forms["checkpoint"], batch_tokens=1).loglikelihood(requests(PAIRS))
    all_ = lm_of(forms["checkpoint"], batch_tokens=10_000).loglikelihood(requests(PAIRS))
    for a, b in zip(one, all_, strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-3)


def test_scores_are_equal_for_checkpoint_packed_file_and_folder(forms, data, capsys) -> None:
    found = {}
    for form, path in forms.items():
        options = ["--tasks", "who,lastword,pronouns", "--tasks_data", str(data), "--json"]
        assert main(["evaluate", str(path), *options]) == 0
        found[form] = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] == found["packed"] == found["hf"]
    metrics = {(score["task"], score["metric"]): score for score in found["hf"]["tasks"]}
    assert set(metrics) == {
        ("who", "acc"), ("who", "acc_norm"), ("lastword_a", "acc"), ("lastword_a", "perplexity"), ("pronouns", "acc"),
    }  # fmt: skip
    assert metrics["who", "acc"]["items"] == 3


def test_items_of_lines_mean_what_they_say(forms, data) -> None:
    """Accuracy and perplexity from log-likelihoods asked one by one."""
    lm = lm_of(forms["checkpoint"])

    def likelihood(context: str, continuation: str) -> tuple[float, bool]:
        return lm.loglikelihood(requests([(context, continuation)]))[0]

    def best(pairs: list[tuple[str, str]]) -> int:
        scores = [likelihood(*pair)[0] for pair in pairs]
        return scores.index(max(scores))

    right = [best([(i["query"].strip() + "\nAnswer:", " " + c) for c in i["choices"]]) == i["gold"] for i in CHOICES]
    words = [likelihood(i["context"], " " + i["continuation"]) for i in WORDS]
    which = [best([(o, " " + i["continuation"]) for o in i["context_options"]]) == i["gold"] for i in OPTIONS]
    scores = {(s.task, s.metric): s.value for s in run_tasks(lm, ["who", "lastword_a", "pronouns"], data=data)}
    assert scores["who", "acc"] == pytest.approx(sum(right) / 3)
    assert scores["lastword_a", "perplexity"] == pytest.approx(math.exp(-sum(w[0] for w in words) / 2), rel=1e-3)
    assert scores["lastword_a", "acc"] == sum(w[1] for w in words) / 2
    assert scores["pronouns", "acc"] == sum(which) / 2


def yaml_task(file: Path, items: Path, **fields: object) -> Path:
    """A task of lm-eval about the lines of ``items``."""
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(items)}}, "test_split": "test"}
    file.write_text(yaml.safe_dump({"task": file.stem, **source, **fields}))
    return file


def test_a_yaml_task_and_a_limit(forms, data, tmp_path, capsys) -> None:
    asks = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
    file = yaml_task(tmp_path / "mine.yaml", data / "who.jsonl", output_type="multiple_choice", **asks)
    assert main(["evaluate", str(forms["packed"]), "--tasks", str(file), "--limit", "2"]) == 0
    said = capsys.readouterr().out
    assert "mine      2  acc" in said and "no published figures" in said


def test_every_filter_of_a_task_has_a_score(forms, data, tmp_path, capsys) -> None:
    """As gsm8k has: what is said is looked at in two ways."""
    file = yaml_task(
        tmp_path / "two_ways.yaml",
        data / "lastword_a.jsonl",
        output_type="generate_until",
        doc_to_text="{{context}}",
        doc_to_target="{{continuation}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 4},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {"name": "loose", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
        ],
    )
    assert main(["evaluate", str(forms["packed"]), "--tasks", str(file), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["tasks"]
    assert [score["metric"] for score in scores] == ["exact_match, strict", "exact_match, loose"]


def test_texts_are_scored_behind_the_token_that_begins_them(forms) -> None:
    """As lm-eval's own wrapper does with a tokenizer that has a BOS token."""
    opened = open_model(forms["checkpoint"])
    bos = opened.tokenizer.token_to_id("z")
    begin_with(opened.tokenizer, "z")
    lm = BitNetLM(opened.model, opened.tokenizer)
    ids = opened.tokenizer.encode("The small dog", add_special_tokens=False).ids
    with torch.inference_mode():
        log_p = opened.model(torch.tensor([[bos, *ids[:-1]]]))[0].double().log_softmax(-1)
    expected = float(log_p.gather(1, torch.tensor(ids)[:, None]).sum())
    (found,) = lm.loglikelihood_rolling(requests([("The small dog",)], "loglikelihood_rolling"))
    assert found == pytest.approx(expected, abs=1e-3)


def test_generation_stops_where_the_task_says(forms) -> None:
    lm = lm_of(forms["checkpoint"])
    full = generate(lm.model, lm.bpe, "The small dog", max_new_tokens=12, temperature=0.0)
    until = full[4:6]
    (text,) = lm.generate_until(requests([("The small dog", {"until": [until], "max_gen_toks": 12})], "generate_until"))
    assert text == full[: full.index(until)]


GOOD = '{"context": "a", "continuation": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nothing.jsonl", None, "no such file"),
        ("empty.jsonl", "", "no JSON object in it"),
        ("list.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("cut.jsonl", GOOD + GOOD[:20] + "\n", "line 2 is no JSON object"),
        ("less.jsonl", GOOD + '{"context": "a"}\n', "line 2 has no continuation"),
        ("number.jsonl", GOOD + '{"context": "a", "continuation": 3}\n', "line 2 continuation = 3: must be a text"),
        ("gold.jsonl", '{"query": "a", "choices": ["b", "c"], "gold": 2}\n', "gold = 2: must be the number of one"),
        ("odd.jsonl", '{"question": "x"}\n', "its fields are question; a task has one of"),
    ],
)
def test_bad_tasks_are_named(name, content, words, tmp_path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        find_task(str(tmp_path / name), None)


def test_refusals_of_the_command(forms, data, tmp_path, capsys) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [")
    (tmp_path / "who.jsonl").write_text((data / "who.jsonl").read_text())
    for options, words in (
        (["--tasks", "unheard"], "cannot be run"),
        (["--tasks", str(broken)], "cannot be run"),
        (["--tasks", "who", "--tasks_data", "nowhere"], "--tasks_data nowhere: no such folder"),
        (["--tasks", "unheard", "--tasks_data", str(data)], "which has lastword_a, pronouns, who"),
        ([], "give either --data.path (a text) or --tasks"),
        (["--tasks", "x", "--stride", "2"], "--stride is for --data.path"),
        (["--tasks", "x", "--batch_size", "2"], "--batch_size is for --data.path"),
        (["--data.path", str(broken), "--few_shot", "5"], "--few_shot is for --tasks"),
        (["--tasks", f"{data / 'who.jsonl'},{tmp_path / 'who.jsonl'}"], "2 tasks are called who; rename one"),
    ):
        assert main(["evaluate", str(forms["packed"]), *options]) == 2
        error = capsys.readouterr().err
        assert words in error and error.strip().count("\n") == 0


def test_forms_of_tasks_have_fields_that_tell_them_apart(data) -> None:
    kinds = {name: task_of_lines(data / f"{name}.jsonl")["output_type"] for name in ("who", "lastword_a", "pronouns")}
    assert kinds == {"who": "multiple_choice", "lastword_a": "loglikelihood", "pronouns": "multiple_choice"}


def test_published_figures_are_of_the_same_size() -> None:
    assert [m.name for m in of_the_same_size(130_000_000, ["piqa"])] == ["OPT-125M"]
    assert of_the_same_size(3_000_000, ["piqa"]) == []
    bitnet = next(m for m in MODELS if m.name == "BitNet b1.58 700M")
    assert sum(bitnet.scores.values()) / 7 == pytest.approx(44.3, abs=0.06)  # the average that the paper prints
    float_twin = next(m for m in MODELS if m.name == "LLaMA FP16 1.3B")
    assert sum(float_twin.scores.values()) / 7 == pytest.approx(46.2, abs=0.06)


def test_an_answer_beyond_the_context_is_refused(forms) -> None:
    with pytest.raises(UserError, match="does not fit into the model's context of 32"):
        lm_of(forms["checkpoint"]).loglikelihood(requests([("Ann", " said so" * 40)]))


@pytest.mark.slow
def test_real_tasks_offline(shared_data, stories, run_fit, tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    run_fit(stories, folder, "--data.seq_len=512", "--data.batch_size=1", "--trainer.max_steps=4")
    forms = forms_of(folder, tmp_path)
    names = "arc_easy,arc_challenge,piqa,boolq,winogrande,lambada"
    options = ["--tasks", names, "--tasks_data", str(shared_data / "eval"), "--limit", "20", "--json"]
    capsys.readouterr()
    found = []
    for path in forms.values():
        assert main(["evaluate", str(path), *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2]
    assert len({score["task"] for score in found[0]["tasks"]}) == 6
