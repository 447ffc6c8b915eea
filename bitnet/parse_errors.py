"""What jsonargparse says about a bad option, in one line."""

import re

from bitnet.errors import UserError, did_you_mean

UNKNOWN_KEY = (
    r"does not accept (?:option|nested key) '([\w.]+)'",
    r"Key '([\w.]+)' is not expected",
    r"Option '([\w.]+)' is not accepted",
    r"[Uu]nrecognized arguments?: -*([\w.]+)",
    r"No action for key \"([\w.]+)\"",
)


def explain(message: str, known: set[str]) -> str:
    """jsonargparse's message in one line: the key, the value, what is valid, and the nearest key to an unknown one."""
    text = " ".join(message.split())
    text = re.sub(r"^Parser key \"?(subcommand|fit)\"?: ", "", text)
    parents = re.findall(r"Parser key \"([\w.]+)\":", text)
    for pattern in UNKNOWN_KEY:
        if match := re.search(pattern, text):
            key = match[1].removeprefix("fit.")
            if key not in known and parents and not key.startswith(parents[0]):
                key = f"{parents[0]}.{key}"
            return f"unknown key '{key}'.{did_you_mean(key, known)}"
    if match := re.search(
        r"Expected an? (?:typing\.)?(Literal\[.*?\]|<class '(?:[\w.]+)'>).*?Got value: (.*?)(?= - |$)", text
    ):
        wanted = match[1].removeprefix("Literal[").rstrip("]")
        wanted = f"one of {wanted}" if match[1].startswith("Literal") else re.sub(r"<class '([\w.]+)'>", r"\1", wanted)
        return f"{'.'.join(parents) or 'a value'} = {match[2]}: expected {wanted}."
    return text if len(text) < 600 else text[:600] + " ..."


def of_jsonargparse(error: Exception) -> UserError | None:
    """What an object of a config (a callback, say) said when it was made, with its class, of all that jsonargparse
    reports then: that it is no list and not None either. None for other errors."""
    text = str(error)
    if not text.startswith("Does not validate against any of the Union subtypes"):
        return None
    reasons = re.findall(r"^  - (.*(?:\n {4,}.*)*)", text, re.MULTILINE)
    said = [" ".join(r.split()) for r in reasons if not r.startswith(("Expected a <class", "Not a valid subclass"))]
    if not said:
        return UserError(" ".join(text.split()))
    made = re.search(r"class_path='([\w.]+)'", text)
    return UserError(said[0] if made is None or made[1] in said[0] else f"{made[1]}: {said[0]}")
