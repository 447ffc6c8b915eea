"""Messages become text by a chat template, a Jinja text that comes with a model.

It comes from a stranger: it runs in Jinja's sandbox, which lets it read the messages and nothing else.
"""

from collections.abc import Sequence
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


def render(
    messages: Sequence[Message], template: str | None, special_tokens: dict[str, str], *, answer_follows: bool
) -> str:
    """The text of ``messages`` (``role`` and ``content``); ``special_tokens`` are names such as ``eos_token``.

    With ``answer_follows`` it ends where the assistant's next answer begins. Raises ``UserError`` for a template that
    fails or reaches for what the sandbox forbids.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        compiled = environment.from_string(PLAIN_TEMPLATE if template is None else template)
        return compiled.render(messages=messages, add_generation_prompt=answer_follows, **special_tokens)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template fails: {error.message or type(error).__name__}.") from error
    except (TypeError, ValueError, ZeroDivisionError, OverflowError, RecursionError) as error:
        raise UserError(f"the chat template fails: {error}.") from error


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
