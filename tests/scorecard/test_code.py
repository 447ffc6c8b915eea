"""F3, F5, F9: nothing in a file runs, nothing here could run it, and templates stay in their sandbox and its limits."""

import ast
import io
import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from bitnet import chat_template
from bitnet.chat_template import render
from bitnet.checkpoint import load_checkpoint
from bitnet.errors import UserError
from bitnet.interchange.opened import open_model
from tests.inference.conftest import low_bit_model
from tests.interchange.test_hf_export import written
from tests.scorecard.test_files import packed_file, replace_in_index, with_header
from tests.scorecard.trials import PATIENCE, folder_of_parts, refusal
from tests.test_architecture import python_files

__all__ = ["packed_file"]


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.check("F3", "malicious checkpoints run nothing, and are never read a second time with less care", 14)
def test_malicious_checkpoints(packed_file, tmp_path, tally, monkeypatch) -> None:

    canary = tmp_path / "canary"
    touch = f"open({str(canary)!r}, 'w')"
    system = Calls(os.system, f"touch {canary}")
    pickle.loads(pickle.dumps(system))
    assert canary.exists()  # the payload works where it is let
    canary.unlink()
    read = torch.load

    def careful(*args: Any, **options: Any) -> Any:
        assert options.get("weights_only") is True
        return read(*args, **options)

    monkeypatch.setattr(torch, "load", careful)
    nested = io.BytesIO()
    torch.save(system, nested)
    config = {"vocab_size": 9, "dim": 8, "n_layers": 1, "n_heads": 2, "ffn_dim": 8}
    entry = {"format_version": 1, "config": config, "recipe": {"name": "BitNet"}, "tokenizer": "{}"}
    by_name = {"class_path": "os.system", "init_args": {"command": f"touch {canary}"}}
    contents: dict[str, Any] = {
        "system": {"bitnet": system, "state_dict": {}},
        "eval": {"bitnet": entry, "state_dict": {"model.a": Calls(eval, touch)}},
        "exec": {"bitnet": entry, "state_dict": {"model.a": Calls(exec, touch)}},
        "import": {"bitnet": entry, "state_dict": {}, "x": Calls(__import__, "antigravity")},
        "nested": {"bitnet": entry, "state_dict": {}, "x": Calls(torch.storage._load_from_bytes, nested.getvalue())},
        "instantiator": {"bitnet": entry, "state_dict": {}, "hyper_parameters": {"_instantiator": "os.system"}},
        "class_path": {"bitnet": {**entry, "recipe": {"name": "os.system", **by_name}}, "state_dict": {}},
        "hyper": {"bitnet": entry, "state_dict": {}, "hyper_parameters": {"_class_path": "os.system", **by_name}},
    }
    files = {f"{name}.ckpt": content for name, content in contents.items()}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(system))
    torch.save(contents["system"], tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    index = folder_of_parts(tmp_path / "index", {"bitnet": entry})
    replace_in_index(index, lambda index: setattr(index, "planner_data", system))
    folder_of_parts(tmp_path / "meta", {"bitnet": system})
    for path in (
        *(tmp_path / name for name in files),
        *(tmp_path / n for n in ("raw.ckpt", "old.ckpt", "index", "meta")),
    ):
        refused = bool(refusal(lambda path=path: load_checkpoint(path), path))
        tally(refused and not canary.exists(), path.name)
    whole = packed_file.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    description = {**json.loads(header["__metadata__"]["bitnet"]), "recipe": {"name": "os.system", **by_name}}
    evil = tmp_path / "evil.safetensors"
    evil.write_bytes(with_header(whole, header, description))
    open_model(evil)  # the recipe of a packed model is a name for people: nothing is made of it
    tally(not canary.exists(), "recipe of a packed model")
    folder = written(opened_for_export(), tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    torch.save(contents["system"], folder / "pytorch_model.bin")
    tally(bool(refusal(lambda: open_model(folder), folder)) and not canary.exists(), "pytorch_model.bin")


def opened_for_export() -> Any:
    from tests.interchange.conftest import opened_model

    return opened_model(dim=64, ffn_dim=64)


CALLS = {"eval", "exec", "compile", "__import__", "extractall"}
OWNED = {("yaml", "load"), ("yaml", "unsafe_load"), ("jinja2", "Template"), ("os", "system"), ("os", "popen")}
"""Unsafe by module and name; so is ``torch.load`` without ``weights_only``."""
BY_NAME = {"torch", "builtins", *(module for module, _ in OWNED)}
"""Modules that must keep their names, or what is called could not be told from the line."""
KEYWORDS = {("weights_only", False), ("trust_remote_code", True), ("shell", True), ("allow_pickle", True)}
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "*"}


def unsafe(node: ast.AST, file: Path) -> str:
    """What is unsafe about a node, or an empty string."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        plain = isinstance(node.func, ast.Name) or name == "extractall"
        if name in CALLS and (plain or owner == "builtins"):
            return f"{owner}.{name}()"
        keywords = {(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)}
        if found := keywords & KEYWORDS:
            return str(found)
        if (owner, name) == ("torch", "load") and ("weights_only", True) not in keywords:
            return "torch.load without weights_only=True"
        if (owner, name) in OWNED:
            return f"{owner}.{name}()"
    if isinstance(node, ast.ImportFrom | ast.Import):
        names = {alias.name.split(".")[0] for alias in node.names} | {
            (getattr(node, "module", None) or "").split(".")[0]
        }
        # The one pickle that is read goes through an unpickler of our own that knows what it may name.
        if found := names & (MODULES - ({"pickle"} if file.name == "sharded_checkpoint.py" else set())):
            return f"imports {found}"
    if isinstance(node, ast.ImportFrom):
        found = {(node.module, alias.name) for alias in node.names} & {*OWNED, ("torch", "load")}
        if found or node.module == "builtins":
            return f"imports from {node.module}"
    if isinstance(node, ast.Import) and any(alias.asname and alias.name in BY_NAME for alias in node.names):
        return "another name for a module"
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "pickle":
        return "" if node.attr in ("Unpickler", "UnpicklingError") else f"pickle.{node.attr}"
    return ""


# Written out and not made from the lists above, so that a word that is lost there is missed here. Parsed, never run.
UNSAFE = (
    "eval(text)", "exec(text)", "compile(text, '', 'exec')", "__import__(name)", "builtins.eval(text)",
    "os.system(text)", "os.popen(text)", "from os import system", "import os as o", "import builtins as b",
    "subprocess.run(text, shell=True)", "archive.extractall(folder)",
    "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=flag)", "from torch import load",
    "import torch as t", "np.load(f, allow_pickle=True)", "model(path, trust_remote_code=True)",
    "yaml.load(f)", "yaml.unsafe_load(f)", "from yaml import unsafe_load", "jinja2.Template(text)",
    "from jinja2 import Template", "import pickle", "import pickle as p", "from pickle import loads", "pickle.loads(b)",
    "import marshal", "import shelve", "import dill", "import cloudpickle", "import joblib", "from somewhere import *",
)  # fmt: skip
SAFE = (
    "torch.load(f, weights_only=True)", "yaml.safe_load(f)", "model.eval()", "re.compile(text)", "block.compile()",
    "platform.system()", "subprocess.run(words)", "import torch", "import os", "from torch import Tensor",
    "from jinja2.sandbox import SandboxedEnvironment", "np.load(f, allow_pickle=False)",
)  # fmt: skip


@pytest.mark.parametrize("line,is_unsafe", [*((s, True) for s in UNSAFE), *((s, False) for s in SAFE)])
def test_unsafe_lines_are_told_from_others(line, is_unsafe) -> None:
    assert any(unsafe(node, Path("x.py")) for node in ast.walk(ast.parse(line))) == is_unsafe


@pytest.mark.check("F5", "no source file holds a call that could run what a file says", 150)
def test_no_unsafe_call(tally) -> None:
    for file in python_files("bitnet", "kernels"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found = [f"{file.name}:{node.lineno}: {why}" for node in ast.walk(tree) if (why := unsafe(node, file))]
        tally(not found, "; ".join(found))


TALK = [{"role": "user", "content": "Who ran?"}, {"role": "assistant", "content": "The dog."}]
NAMES = {"eos_token": "<|endoftext|>", "bos_token": ""}
TEMPLATES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{% set f = '{0.__init__.__globals__[os]}'.format %}{{ f(raise_exception) }}",
    "{{ ('x' | attr('__class__')).__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as p %}",
    "{% for x in range(10**9) %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(400) }}",
    "{{ 10 ** (10 ** 9) }}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ [0] * 10 ** 10 }}",
    "{{ raise_exception('roles must alternate') }}",
    "{{ 1 / 0 }}",
    "{% if %}",
    "{{ messages | groupby('x') | list | tojson | safe | nothing }}",
]


@pytest.mark.check("F9", "hostile chat templates are refused, and bounded in time, memory and output", 20)
def test_templates(tmp_path, tally, monkeypatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    monkeypatch.setattr(chat_template, "LONGEST", 200_000)
    canary, messages = tmp_path / "canary", [dict(message) for message in TALK]
    render(messages, None, NAMES, answer_follows=True)
    for template in TEMPLATES:
        started = time.monotonic()
        template = template.replace("CANARY", str(canary))
        said = refusal(lambda template=template: render(messages, template, NAMES, answer_follows=True))
        late = time.monotonic() - started > 2.0 * PATIENCE
        tally(said.startswith("the chat template fails") and not canary.exists() and not late, f"{template}: {said!r}")
        assert messages == TALK
    assert render(messages, "{{ messages[0].content }}", NAMES, answer_follows=True) == "Who ran?"  # and goes on


def test_a_broken_template_is_found_before_the_first_question(tmp_path) -> None:
    from bitnet.chat import Conversation

    tokenizer = Tokenizer(models.BPE({"a": 0, "<|endoftext|>": 1}, []))
    with pytest.raises(UserError, match="the chat template fails"):
        Conversation(low_bit_model(), tokenizer, "{% if %}", 1)
