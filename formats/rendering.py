"""Renders chat templates in a process of its own, so that one that loops or grows can be stopped:
formats/chat.py runs this file, with a request as JSON on stdin and {"texts": [..]} or {"error": ".."} on
stdout.

A template is a program that came with a checkpoint, so it gets jinja2's sandbox, which lets it reach nothing
but what it is given, and so much memory and text, and as much time as the request says.
"""

import contextlib
import datetime
import json
import resource
import sys

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30  # bytes, where the system enforces it (macOS does not)
CHARACTERS = 2**22  # of one conversation


class Generation(Extension):
    """{% generation %} .. {% endgeneration %}, which marks in some templates what a training learns: passed
    over."""

    tags = {"generation"}  # noqa: RUF012  jinja2's name

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def refuse(message: str):
    """What templates call where they do not accept a conversation."""
    raise TemplateError(message)


def environment() -> ImmutableSandboxedEnvironment:
    """jinja2 as Hugging Face's library sets it up for chat templates (`_compile_jinja_template`)."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def render(template, variables: dict) -> str:
    """The text of one conversation. Raises TemplateError for one that is too long."""
    parts, size = [], 0
    for part in template.generate(**variables):
        parts.append(part)
        size += len(part)
        if size > CHARACTERS:
            refuse(f"its text is longer than {CHARACTERS:,} characters")
    return "".join(parts)


def answer(request: dict) -> dict:
    """What to reply: request has the template, and a list of the variables of each conversation."""
    try:
        template = environment().from_string(request["template"])
        return {"texts": [render(template, variables) for variables in request["conversations"]]}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:  # whatever a stranger's program raises
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        return {"error": f"{kind}{' '.join(str(error).split())[:200]}"}


def main() -> None:
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"]))  # of the processor
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    json.dump(answer(request), sys.stdout)


if __name__ == "__main__":
    main()
