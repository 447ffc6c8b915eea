"""Renders chat templates, one after another: the program of the process that ``chat_template`` starts.

It imports nothing of this library and is run by its path. Requests and answers are JSON texts behind their length in
four bytes. Sandbox, memory and time are limited here; the other side ends the process when it is late all the same.
"""

import json
import signal
import struct
import sys
from typing import Any, BinaryIO

MEMORY = 1 << 30
"""Address space of the process: Python and Jinja take a tenth of it."""


def send(file: BinaryIO, message: dict[str, Any]) -> None:
    content = json.dumps(message).encode()
    file.write(struct.pack("<I", len(content)) + content)
    file.flush()


def limit_memory() -> None:
    try:
        import resource
    except ImportError:
        return  # not on Windows
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def render(request: dict[str, Any], environment: Any) -> dict[str, str]:
    """``text``, or ``error`` in words."""
    import jinja2

    try:
        compiled, pieces, length = environment.from_string(request["template"]), [], 0
        for piece in compiled.generate(**request["names"]):
            pieces.append(piece)
            length += len(piece)
            if length > request["longest"]:
                return {"error": f"its text is longer than {request['longest']:,} characters"}
        return {"text": "".join(pieces)}
    except jinja2.TemplateError as error:
        return {"error": str(error.message or type(error).__name__)}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MB"}
    except Exception as error:  # the template is a program: it can fail in any way
        return {"error": str(error) or type(error).__name__}


def main() -> None:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    limit_memory()

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    alarm = getattr(signal, "setitimer", None)
    while length := sys.stdin.buffer.read(4):
        request = json.loads(sys.stdin.buffer.read(struct.unpack("<I", length)[0]))
        if alarm:
            alarm(signal.ITIMER_REAL, 2 * request["seconds"])  # should the other side be gone
        answer = render(request, environment)
        if alarm:
            alarm(signal.ITIMER_REAL, 0)
        send(sys.stdout.buffer, answer)


if __name__ == "__main__":
    main()
