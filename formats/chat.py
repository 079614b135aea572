"""Chats: a conversation becomes the text that a model was trained on, by the template that came with its
checkpoint (jinja2, as Hugging Face's library writes it)."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.files import read_json
from formats.checkpoint import read_checkpoint
from formats.tokenizer import GUARD, Tokenizer

SECONDS = 10  # until a rendering is stopped
MARK = "\ufdd1"  # no character: stands for an answer whose end is looked for
LONGEST = 2**20  # characters of a template


# ---------------------------------------------------------------- where templates lie


def find_template(folder: Path) -> str | None:
    """The template of a Hugging Face folder; of several the one called default. Raises UserError."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return checked(path.read_text(encoding="utf-8"), path)
        except UnicodeDecodeError:
            raise UserError(f"{path}: holds bytes that are not UTF-8") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = folder / name
        stated = read_json(path, "settings of a tokenizer").get("chat_template") if path.is_file() else None
        if isinstance(stated, list):
            named = [entry for entry in stated if isinstance(entry, dict) and entry.get("name") == "default"]
            stated = named[-1].get("template") if named else None
        if stated is not None:
            return checked(stated, path)
    return None


def checked(template, where) -> str:
    """A template, which must be text of a length that can be. Raises UserError."""
    if not isinstance(template, str) or len(template) > LONGEST:
        raise UserError(f"{where}: its chat_template is no text of at most {LONGEST:,} characters")
    return template


def load_chat(path: str | os.PathLike, tokenizer: Tokenizer | None) -> "Chat":
    """The chat of a checkpoint, for its tokenizer. Raises UserError where it has none."""
    template = read_checkpoint(path).get("chat_template")
    if tokenizer is None or template is None:
        lacks = "chat template" if tokenizer else "tokenizer"
        remedy = (
            "give the prompt without --chat, or convert a model that was trained to chat (its -Instruct form)"
        )
        raise UserError(f"{path}: has no {lacks}; {remedy}")
    return Chat(checked(template, path), tokenizer, f"{path}: its chat template")


# ---------------------------------------------------------------- from a conversation to tokens


def conversation(prompt: str, shots: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Turns as (role, text): solved examples as turns of user and assistant, then the prompt."""
    turns = []
    for asked, answered in shots:
        turns += [("user", asked), ("assistant", answered)]
    return [*turns, ("user", prompt)]


class Chat:
    """A template with the tokenizer of its checkpoint; `name` is what to call it in errors. Raises UserError
    where jinja2 is missing."""

    def __init__(self, template: str, tokenizer: Tokenizer, name: str = "the chat template"):
        if importlib.util.find_spec("jinja2") is None:
            raise UserError("--chat needs the package jinja2; pip install jinja2")
        self.template, self.tokenizer, self.name = template, tokenizer, name
        self.ends = self._ends()

    def __repr__(self) -> str:
        return f"Chat({self.name!r})"

    def texts(self, conversations: Sequence[list[tuple[str, str]]], answer: bool = True) -> list[str]:
        """Each conversation as the model reads it, up to where its answer begins; with `answer` False up to
        the end of the last turn. Special tokens that stand in the turns are kept from being tokens by GUARD.
        Raises UserError for a template that raises, or takes too long."""
        tokenizer, asked = self.tokenizer, []
        ends = tokenizer.piece(tokenizer.ends[0]) if tokenizer.ends else ""
        begin = "" if tokenizer.begin is None else tokenizer.piece(tokenizer.begin)
        for turns in conversations:
            messages = [{"role": role, "content": self.guarded(text)} for role, text in turns]
            asked.append(
                {
                    "messages": messages,
                    "add_generation_prompt": answer,
                    "bos_token": begin,
                    "eos_token": ends,
                    "tools": None,
                    "documents": None,
                }
            )
        reply = self._render({"template": self.template, "conversations": asked})
        if "error" in reply:
            raise UserError(f"{self.name} fails: {reply['error']}")
        return reply["texts"]

    def encode(self, conversations: Sequence[list[tuple[str, str]]]) -> list[list[int]]:
        """Token ids of each conversation, up to where the answer begins. Raises UserError as `texts` does."""
        return [self.tokenizer.encode(text, special=True) for text in self.texts(conversations)]

    def guarded(self, text: str) -> str:
        """A text whose special tokens `encode` will take for letters."""
        for special in self.tokenizer.specials:
            text = text.replace(special, special[0] + GUARD + special[1:])
        return text

    def _ends(self) -> tuple[int, ...]:
        """The token with which the template ends an answer, so that a model's answer ends there, too; none if
        it ends it with plain text."""
        try:
            (text,) = self.texts([[("user", "?"), ("assistant", MARK)]], answer=False)
        except UserError:  # which the user's own conversation will raise, too, or it does not matter
            return ()
        after = text.rpartition(MARK)[2].lstrip()
        found = [special for special in self.tokenizer.specials if after.startswith(special)]
        return (self.tokenizer.specials[max(found, key=len)],) if found else ()

    def _render(self, request: dict) -> dict:
        """The reply of rendering.py to a request."""
        command = [sys.executable, str(Path(__file__).with_name("rendering.py"))]
        seconds = SECONDS + len(request["conversations"]) // 100
        request["seconds"] = seconds  # of the processor; the clock allows more, for a busy machine
        too_long = {"error": f"it takes longer than {seconds} s, or more memory than it may"}
        text = json.dumps(request)
        try:
            done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=3 * seconds)
        except subprocess.TimeoutExpired:
            return too_long
        if done.returncode < 0:  # stopped by the system: beyond its limits
            return too_long
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise UserError(f"{self.name} cannot be rendered ({lines[-1][:150]})")
        return json.loads(done.stdout)
