"""Chats: a conversation is rendered as the kind of text that a model was trained on, with the template that
came with its checkpoint (jinja2, as Hugging Face's library uses it)."""

import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.files import read_json, reading
from formats.checkpoint import read_checkpoint
from formats.tokenizers.tokenizer import GUARD, Tokenizer

MARK = "\ufdd1"  # a noncharacter, in place of an answer whose end is looked for
LONGEST_TEXT = 2**22  # characters


# ---------------------------------------------------------------- where templates lie


def find_template(folder: Path) -> str | None:
    """The template of a Hugging Face folder, the one named default if there are several. Raises UserError."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = folder / name
        stated = read_json(path, "settings of a tokenizer").get("chat_template") if path.is_file() else None
        if isinstance(stated, list):
            stated = {entry.get("name"): entry.get("template") for entry in stated}.get("default")
        if stated is not None:
            return check_template(stated, path)
    return None


def check_template(template, where) -> str | None:
    """A template, or None. Raises UserError for anything but a text."""
    if not isinstance(template, str | None):
        raise UserError(f"{where}: its chat template is not a text")
    return template


def load_chat(path: str | os.PathLike, tokenizer: Tokenizer | None) -> "Chat":
    """The `Chat` of a checkpoint, for its tokenizer. Raises UserError if template or tokenizer is missing."""
    template = read_checkpoint(path).get("chat_template")
    if tokenizer is None or template is None:
        lacks = "chat template" if tokenizer else "tokenizer"
        remedy = "leave out --chat, or convert a model that was trained to chat (its -Instruct form)"
        raise UserError(f"{path}: has no {lacks}; {remedy}")
    return Chat(template, tokenizer, f"{path}: its chat template")


# ---------------------------------------------------------------- rendering


def compile_template(template: str):
    """Compiles a template with jinja2, set up as in Hugging Face's library (`_compile_jinja_template`): in a
    sandbox, so that it can reach nothing but its arguments. Raises UserError if jinja2 is missing,
    TemplateError for a mistake in the template."""
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("--chat needs the package jinja2; pip install jinja2") from None

    class GenerationTag(Extension):
        """Ignores the tags {% generation %} and {% endgeneration %}, which enclose what is trained on."""

        tags = {"generation"}  # noqa: RUF012  jinja2's name

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message: str):
        """Templates call this where they do not accept a conversation."""
        raise TemplateError(message)

    extensions = [GenerationTag, "jinja2.ext.loopcontrols"]
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made.from_string(template)


# ---------------------------------------------------------------- from a conversation to tokens


def conversation(prompt: str, shots: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Turns as (role, text): solved examples as turns of user and assistant, then the prompt."""
    turns = []
    for prompt_shown, answer_shown in shots:
        turns += [("user", prompt_shown), ("assistant", answer_shown)]
    return [*turns, ("user", prompt)]


class Chat:
    """A template with the tokenizer of its checkpoint; errors call it `name`. Raises UserError if jinja2 is
    missing or the template has a mistake."""

    def __init__(self, template: str, tokenizer: Tokenizer, name: str = "the chat template"):
        self.template, self.tokenizer, self.name = template, tokenizer, name
        with reading(name, "fails"):
            self._program = compile_template(template)
        self.ends = self._ends()

    def __repr__(self) -> str:
        return f"Chat({self.name!r})"

    def text(self, turns: list[tuple[str, str]], answer: bool = True) -> str:
        """A conversation as the model reads it, up to where its answer begins; with `answer` False up to the
        end of the last turn. GUARD keeps special tokens that are written in the turns from becoming tokens.
        Raises UserError if the template raises an exception, or writes too much text."""
        tokenizer, text = self.tokenizer, ""
        begin = "" if tokenizer.begin is None else tokenizer.piece(tokenizer.begin)
        end = tokenizer.piece(tokenizer.ends[0]) if tokenizer.ends else ""
        given = {"add_generation_prompt": answer, "bos_token": begin, "eos_token": end}
        given |= {"tools": None, "documents": None}
        messages = [{"role": role, "content": self.guarded(said)} for role, said in turns]
        with reading(self.name, "fails"):  # whatever a stranger's template raises
            for part in self._program.generate(messages=messages, **given):
                text += part
                if len(text) > LONGEST_TEXT:
                    raise UserError(f"{self.name} writes more than {LONGEST_TEXT:,} characters")
        return text

    def encode(self, turns: list[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins. Raises UserError as `text` does."""
        return self.tokenizer.encode(self.text(turns), special=True)

    def guarded(self, text: str) -> str:
        """The text with GUARD in its special tokens, so that `encode` treats them as plain text."""
        for special in self.tokenizer.specials:
            text = text.replace(special, special[0] + GUARD + special[1:])
        return text

    def _ends(self) -> tuple[int, ...]:
        """The special token with which the template ends an answer, so that a model's answer ends there, too;
        none if an answer ends with plain text."""
        try:
            text = self.text([("user", "?"), ("assistant", MARK)], answer=False)
        except UserError:  # if it matters, the user's own conversation will raise it, too
            return ()
        after = text.rpartition(MARK)[2].lstrip()
        found = [special for special in self.tokenizer.specials if after.startswith(special)]
        return (self.tokenizer.specials[max(found, key=len)],) if found else ()
