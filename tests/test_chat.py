"""Chat templates against transformers', the sandbox, conversations as training data, and talking."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from bitnet.__main__ import main
from bitnet.chat import Conversation
from bitnet.chat_template import PLAIN_TEMPLATE, ChatText, conversation, render
from bitnet.data.datamodule import TokenDataModule
from bitnet.data.tokenizer import begin_with, find_eos, template_tokens, train_tokenizer
from bitnet.data.tokens import UNSAID
from bitnet.errors import UserError
from bitnet.generation import Sampling
from bitnet.interchange.opened import open_model
from bitnet.loss import IGNORE, next_token_loss

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "Who ran?"},
    {"role": "assistant", "content": "The small dog."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Over the hill."},
]
NAMES = {"eos_token": "<|endoftext|>", "bos_token": ""}


@pytest.mark.parametrize("template", [CHATML, PLAIN_TEMPLATE])
@pytest.mark.parametrize("answer_follows", [True, False])
def test_templates_render_as_in_transformers(template, answer_follows) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(["text"], 257), eos_token="<|endoftext|>")
    theirs.chat_template = template
    for messages in (TALK[:1], TALK, [{"role": "system", "content": " Be brief.\n"}, *TALK]):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows)
        assert render(messages, template, NAMES, answer_follows=answer_follows) == expected


LLAMA_2 = (  # as its authors write it: each question begins anew
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_only_the_first_bos_token_is_left_to_the_tokenizer() -> None:
    """Whatever white space is before it; and a token that is put behind texts is none."""
    named = {"eos_token": "</s>", "bos_token": "<s>"}
    text = render(TALK[:3], "\n" + LLAMA_2, named, answer_follows=True)
    assert text == "\n[INST] Who ran? [/INST] The small dog. </s><s>[INST] Where? [/INST]"
    tokenizer = train_tokenizer(["text"], 300)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A:0 <|endoftext|>:0", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    )
    assert template_tokens(tokenizer, find_eos(tokenizer)) == {"eos_token": "<|endoftext|>", "bos_token": ""}


@pytest.mark.parametrize("template", [CHATML, LLAMA_2], ids=["chatml", "llama-2"])
def test_ids_of_a_tokenizer_that_begins_texts_are_those_of_transformers(template) -> None:
    """There every question has its <s>, the first one too, and only one of them."""
    tokenizer = train_tokenizer(["text"], 300)
    tokenizer.add_special_tokens(["<s>"])
    begin_with(tokenizer, "<s>")
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<s>")
    theirs.chat_template = template
    for messages in (TALK[:1], TALK[:3]):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        named = template_tokens(tokenizer, find_eos(tokenizer))
        ids = tokenizer.encode(render(messages, template, named, answer_follows=True)).ids
        begins = [] if template == LLAMA_2 else [tokenizer.token_to_id("<s>")]  # where the template names none
        assert ids == begins + expected


def test_answers_are_parts_of_their_own() -> None:
    text = conversation(TALK, CHATML, NAMES)
    assert isinstance(text, ChatText)
    assert text == render(TALK, CHATML, NAMES, answer_follows=False)
    assert [part for part, said in text.parts if said] == ["The small dog.<|im_end|>\n", "Over the hill.<|im_end|>\n"]
    # What is before an answer is exactly the prompt of a model that answers.
    assert text.parts[0] == (render(TALK[:1], CHATML, NAMES, answer_follows=True), False)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "must be a list"),
        ([], "must be a list"),
        ([{"role": "user"}], "needs a role and a content"),
        ([{"role": "user", "content": "x"}], "nothing to learn"),
    ],
)
def test_bad_conversations_are_refused(messages, words) -> None:
    with pytest.raises(UserError, match=words):
        conversation(messages, None, NAMES)


def test_a_template_without_the_answers_is_refused() -> None:
    with pytest.raises(UserError, match="leaves the answers out"):
        conversation(TALK, "constant", NAMES)


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    with pytest.raises(UserError, match="changes what was said before"):
        conversation(TALK, "{{ messages | length }}{{ messages[-1].content }}", NAMES)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    talks = [TALK[:2], TALK, [{"role": "system", "content": "Be kind."}, *TALK[2:]]] * 20
    file.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    return file


def test_only_answers_are_targets(chats, tmp_path) -> None:
    """The ids of a token file, taken apart by hand."""
    data = TokenDataModule(
        str(chats), chat_template="plain", vocab_size=300, seq_len=16, batch_size=2, cache_dir=str(tmp_path / "cache")
    )
    store = data.prepare_tokens()
    ids = np.asarray(store.ids("train-0")).astype(np.int64)
    said, all_ = ids[ids < UNSAID], ids % UNSAID
    text = store.tokenizer.decode(said.tolist(), skip_special_tokens=False)
    assert set(text.split("<|endoftext|>\n")) <= {" The small dog.", " Over the hill.", ""}
    whole = store.tokenizer.decode(all_.tolist(), skip_special_tokens=False)
    assert whole.startswith(("User: Who ran?\nAssistant: The small dog.<|endoftext|>\n", "Be kind."))
    batch = next(iter(data.train_dataloader()))
    assert int(batch["inputs"].max()) < store.vocab_size
    assert 0 < int((batch["targets"] != IGNORE).sum()) < batch["targets"].numel()
    kept = batch["targets"][batch["targets"] != IGNORE]
    assert int(kept.max()) < store.vocab_size
    for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
        known = targets[:-1] != IGNORE
        assert torch.equal(inputs[1:][known], targets[:-1][known])


def test_a_batch_without_answers_teaches_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10))
    batch = {"inputs": torch.zeros(2, 3, dtype=torch.int64), "targets": torch.full((2, 3), IGNORE)}
    loss = next_token_loss(model, batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(not p.grad.any() for p in model.parameters())


@pytest.fixture
def answering(chats, tmp_path, run_fit) -> Path:
    """Folder of a run of some steps on conversations."""
    folder = tmp_path / "run"
    options = ["--data.chat_template=plain", "--trainer.max_steps=80", "--model.optim.lr=1e-2", "--data.seq_len=64"]
    run_fit(chats, folder, *options, "--model.config.dropout=0")
    return folder


def test_fit_on_conversations_learns_the_answers_and_chat_gives_them(answering, monkeypatch, capsys, tmp_path) -> None:
    summary = json.loads((answering / "summary.json").read_text())
    assert summary["figures"]["val/loss"] < 0.5
    said = iter(["Who ran?", "Where?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(said))
    assert main(["generate", str(answering), "--chat", "--temperature", "0", "--max_new_tokens", "20"]) == 0
    assert capsys.readouterr().out == "The small dog.\nOver the hill.\n"
    assert open_model(answering).chat_template == PLAIN_TEMPLATE
    packed = tmp_path / "m.safetensors"
    assert main(["pack", str(answering), "--out", str(packed)]) == 0
    assert open_model(packed).chat_template == PLAIN_TEMPLATE


def test_bytes_that_are_not_utf8_are_one_line(answering, monkeypatch, capsys) -> None:
    capsys.readouterr()
    for errors in ("strict", "surrogateescape"):  # as in a UTF-8 locale, and as in that of C
        said = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", said)
        assert main(["generate", str(answering), "--chat"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --chat") and "not UTF-8" in error and error.count("\n") == 1


def test_old_messages_make_room(answering) -> None:
    opened = open_model(answering)
    talk = Conversation(opened.model, opened.tokenizer, opened.chat_template, opened.eos_id)
    for _ in range(6):
        text = "".join(talk.answer("Who ran?", max_new_tokens=10, sampling=Sampling(temperature=0)))
        assert text == "The small dog."
    assert len(talk.messages) == 12
    with pytest.raises(UserError, match="does not fit"):
        list(talk.answer("word " * 200))
    assert len(talk.messages) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chat_template": "nowhere.jinja"}, "neither 'plain' nor a file"),
        ({"chat_template": "plain", "streaming": True}, "not streamed"),
        ({"chat_template": "latin.jinja"}, "cannot be read as UTF-8"),
    ],
)
def test_bad_settings_are_refused(options, words, chats, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.jinja").write_bytes("{{ 'caf\u00e9' }}".encode("latin-1"))
    with pytest.raises(UserError, match=words):
        TokenDataModule(str(chats), **options)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"messages": 3}\n', "line 1: 'messages' must be a list"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\nnot json', "line 2 is not JSON"),
    ],
)
def test_bad_lines_are_named(content, words, tmp_path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    data = TokenDataModule(str(file), chat_template="plain", vocab_size=300, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=words):
        data.prepare_tokens()


def test_turns_of_a_conversation_see_each_other_when_documents_are_masked(tmp_path) -> None:
    """The end-of-text token behind an answer ends no document: only the one that the model is not taught to say."""
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join(json.dumps({"messages": TALK}) for _ in range(40)))
    options = {"mask_documents": True, "seq_len": 200, "batch_size": 1, "vocab_size": 300}
    data = TokenDataModule(str(file), chat_template="plain", cache_dir=str(tmp_path / "cache"), **options)
    store = data.prepare_tokens()
    folder = TokenDataModule(str(store.folder), **options)  # knows by itself what is in it
    folder.prepare_tokens()
    for batch in (next(iter(data.val_dataloader())), next(iter(folder.train_dataloader()))):
        ids, documents = batch["inputs"][0], batch["document_ids"][0]
        whole = store.tokenizer.decode(ids[documents == 1].tolist(), skip_special_tokens=False)
        assert whole == conversation(TALK, PLAIN_TEMPLATE, NAMES) + "<|endoftext|>"


def test_one_conversation_cannot_be_divided(tmp_path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"messages": TALK}))
    data = TokenDataModule(str(file), chat_template="plain", vocab_size=300, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="one conversation cannot be divided"):
        data.prepare_tokens()


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--chat", "--prompt", "x"], "leave out --prompt"), ([], "give a --prompt, or --chat")],
)
def test_chat_or_prompt(options, words, answering, capsys) -> None:
    assert main(["generate", str(answering), *options]) == 2
    assert words in capsys.readouterr().err
