"""Messages become text by a chat template, a Jinja text that comes with a model.

It comes from a stranger: it runs in Jinja's sandbox, which lets it read the messages and nothing else, and in a process
of its own with a limit of time, memory and output, since a sandbox lets a program loop for days.
"""

import atexit
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet.errors import UserError

Message = dict[str, str]

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n"
    "{% elif message.role == 'system' %}{{ message.content }}\n"
    "{% else %}User: {{ message.content }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models that bring no template: words that any tokenizer has, and the end-of-text token after each answer."""


SECONDS = 5.0
"""What a template may take for one conversation; rendering takes a thousandth of it."""
START_SECONDS = 60.0
LONGEST = 4_000_000
"""Characters that it may write: more than any context holds."""


def render(
    messages: Sequence[Message], template: str | None, special_tokens: dict[str, str], *, answer_follows: bool
) -> str:
    """The text of ``messages`` (``role`` and ``content``); ``special_tokens`` are names such as ``eos_token``.

    With ``answer_follows`` it ends where the assistant's next answer begins. The first word is left out where it is
    the ``bos_token``, which the tokenizer puts before every text. Raises ``UserError`` for a template that fails,
    reaches for what the sandbox forbids, or is beyond its limits.
    """
    names = {**special_tokens, "messages": list(messages), "add_generation_prompt": answer_follows}
    request = {
        "template": PLAIN_TEMPLATE if template is None else template,
        "names": names,
        "seconds": SECONDS,
        "longest": LONGEST,
    }
    answer = _Renderer.of_this_process().ask(request)
    if "text" not in answer:
        raise UserError(f"the chat template fails: {answer['error']}.")
    text, words = answer["text"], answer["text"].lstrip()
    return text[: len(text) - len(words)] + words.removeprefix(special_tokens["bos_token"])


def check_template(template: str | None, special_tokens: dict[str, str]) -> None:
    """Render one question, so that a broken template is found before a user has typed one. Raises ``UserError``."""
    render([{"role": "user", "content": "Hello"}], template, special_tokens, answer_follows=True)


class _Renderer:
    """The process that renders. It ends with this one; one that is late is ended, and the next call starts another."""

    _current: "tuple[int, _Renderer] | None" = None

    @classmethod
    def of_this_process(cls) -> "_Renderer":
        """Forked processes must not share the pipes of their parent."""
        if cls._current is None or cls._current[0] != os.getpid():
            cls._current = (os.getpid(), cls())
        return cls._current[1]

    def __init__(self) -> None:
        program = Path(__file__).with_name("template_process.py")
        # -P: the folder of the script holds modules of this library, which are not to be found by their bare names.
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        atexit.register(self.end)
        # An empty template: the time to start Python is not the template's.
        self._exchange({"template": "", "names": {}, "seconds": START_SECONDS, "longest": 0}, START_SECONDS)

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        try:
            return self._exchange(request, SECONDS)
        except TimeoutError:
            return {"error": f"it takes longer than {SECONDS:g} seconds"}
        except (OSError, EOFError):
            return {"error": "the process that renders it has ended"}

    def _exchange(self, request: dict[str, Any], seconds: float) -> dict[str, str]:
        assert self._process.stdin and self._process.stdout
        until = time.monotonic() + seconds
        done = False
        try:
            content = json.dumps(request).encode()
            self._process.stdin.write(struct.pack("<I", len(content)) + content)
            self._process.stdin.flush()
            length = struct.unpack("<I", self._read(4, until))[0]
            if length > 6 * LONGEST + 1000:  # JSON writes a character in six at most
                raise EOFError
            answer: dict[str, str] = json.loads(self._read(length, until))
            done = True
            return answer
        finally:
            if not done:  # whatever was the matter: the next call must not find half an answer
                self.end()

    def _read(self, n: int, until: float) -> bytes:
        assert self._process.stdout
        content = bytearray()
        while len(content) < n:
            if not select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(self._process.stdout.fileno(), n - len(content))
            if not part:
                raise EOFError
            content += part
        return bytes(content)

    def end(self) -> None:
        if type(self)._current and type(self)._current[1] is self:  # type: ignore[index]
            type(self)._current = None
        atexit.unregister(self.end)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe:
                    pipe.close()
            except OSError:
                pass  # what was not sent is not missed


class ChatText(str):
    """The text of a conversation; ``parts`` are its pieces in order, each with whether the assistant says it."""

    parts: tuple[tuple[str, bool], ...]

    def __new__(cls, parts: Sequence[tuple[str, bool]]) -> "ChatText":
        new = super().__new__(cls, "".join(text for text, _ in parts))
        new.parts = tuple(parts)
        return new


def conversation(messages: Any, template: str | None, special_tokens: dict[str, str]) -> ChatText:
    """Render a conversation so that each answer is a part of its own: what a model is taught to say.

    Raises ``UserError`` for messages without role and content, and for a template that renders the beginning of a
    conversation otherwise once more has been said: then nobody can tell where an answer begins.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("'messages' must be a list of {role, content}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError("each message needs a role and a content, both texts")
    parts: list[tuple[str, bool]] = []
    done = ""
    for end, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            continue
        before = render(messages[: end - 1], template, special_tokens, answer_follows=True)
        after = render(messages[:end], template, special_tokens, answer_follows=False)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError("the chat template changes what was said before when more is said")
        parts += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    parts = [part for part in parts if part[0]]
    if not parts:
        raise UserError("no message of the role 'assistant': there is nothing to learn")
    if not any(said for _, said in parts):
        raise UserError("the chat template leaves the answers out: there is nothing to learn")
    return ChatText(parts)
