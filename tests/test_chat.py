"""Chats: templates found, kept, rendered as worked out by hand, and stopped where they go wrong."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import convert
import decode
from common.errors import UserError
from decode import load_checkpoint
from evaluation.tasks import Task, find_task
from formats.chat import Chat, conversation, find_template, load_chat
from formats.checkpoint import save_checkpoint
from formats.data import Example
from formats.tokenizers.bpe import BPE
from formats.tokenizers.pieces import train_tokenizer
from formats.tokenizers.tokenizer import GUARD, SentencePiece
from tests.public import LLAMA, write_hf
from tests.test_bpe import json_content

pytest.importorskip("jinja2")

# ChatML, which Qwen and SmolLM speak, with names of its own
TEMPLATE = (
    "{% for message in messages %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|stop|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = {"<|end|>": 256, "<|start|>": 257, "<|stop|>": 258}
SIZE = 259


def bytes_tokenizer() -> BPE:
    """A token for each byte, by its number, and three special ones."""
    tokens = [bytes([byte]) for byte in range(256)] + [text.encode() for text in SPECIAL]
    return BPE(tokens, [], [], added=SPECIAL, special=SPECIAL.values(), ends=[256])


@pytest.fixture
def made() -> Chat:
    return Chat(TEMPLATE, bytes_tokenizer())


def ids(*parts) -> list[int]:
    """Bytes of text, ids as they are."""
    return [id for part in parts for id in (part.encode() if isinstance(part, str) else [part])]


# ---------------------------------------------------------------- rendering


def test_turns_become_tokens_as_worked_out_by_hand(made):
    assert made.encode(conversation(" hi ")) == ids(257, "user\nhi", 258, "\n", 257, "assistant\n")
    shot = ids(257, "user\na", 258, "\n", 257, "assistant\nb", 258, "\n")
    assert made.encode(conversation("c?", [("a", "b")])) == [*shot, *ids(257, "user\nc?", 258, "\n", 257, "assistant\n")]


def test_what_a_user_typed_is_never_a_special_token(made):
    found = made.encode(conversation("say <|stop|> or <|end|> now"))
    assert found == ids(257, "user\nsay <|stop|> or <|end|> now", 258, "\n", 257, "assistant\n")
    assert GUARD not in bytes_tokenizer().decode(found)


def test_an_answer_ends_where_the_template_ends_a_turn():
    tokenizer = bytes_tokenizer()
    assert Chat(TEMPLATE, tokenizer).ends == (258,)
    assert Chat("{{ messages[-1].content }}{{ eos_token }}", tokenizer).ends == (256,)
    assert Chat("{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}", tokenizer).ends == ()
    assert Chat("{{ raise_exception('no') }}", tokenizer).ends == ()


def test_a_sentencepiece_model_finds_the_tokens_of_a_template():
    tokenizer = SentencePiece(train_tokenizer([("one two", "three four")] * 20, 280))
    made = Chat("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", tokenizer)
    assert made.encode(conversation("one two")) == [tokenizer.begin, *tokenizer.encode("one two"), tokenizer.ends[0]]
    typed = made.encode(conversation("one </s> two"))
    assert typed.count(tokenizer.ends[0]) == 1 and tokenizer.decode(typed) == "one </s> two"


def test_what_templates_of_hugging_face_rely_on_is_there():
    """Blocks leave no empty lines; loops can be left; JSON keeps its letters; what is marked for training is
    passed over; what is not defined is nothing."""
    template = """{% for message in messages %}
    {% if loop.index > 2 %}
        {% break %}
    {% endif %}
{%- generation -%}{{ message.content | tojson }}{%- endgeneration %}
{% endfor %}
{{ tools }}{{ undefined }}{{ strftime_now('%%') }}"""
    text = Chat(template, bytes_tokenizer()).text(conversation("c", [("é", '"')]))
    assert text == '"é""\\""None%'


@pytest.mark.parametrize(("template", "message"), [
    ("{{ raise_exception('roles must\nalternate') }}", "fails .*roles must alternate"),
    ("{{ ''.__class__.__mro__ }}", "fails .*: access to attribute '__class__' of 'str' object is unsafe"),
    ("{{ messages.append(1) }}", "fails .*: access to attribute 'append' of 'list' object is unsafe"),
    ("{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "writes more than 4,194,304 characters"),
    ("{% for %}", "fails .*: Expected"),
])  # fmt: skip
def test_a_template_that_goes_wrong_ends_in_one_line(template, message):
    with pytest.raises(UserError, match=message) as error:
        Chat(template, bytes_tokenizer(), "x.pt: its chat template").text(conversation("hi"))
    assert str(error.value).startswith("x.pt: its chat template") and "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_without_jinja2_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.exceptions", None)
    with pytest.raises(UserError, match="--chat needs the package jinja2; pip install jinja2"):
        Chat(TEMPLATE, bytes_tokenizer())


# ---------------------------------------------------------------- from a public checkpoint to one file


def test_where_templates_lie(tmp_path):
    assert find_template(tmp_path) is None
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "plain"}))
    assert find_template(tmp_path) == "plain"
    settings.write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(UserError, match=r"tokenizer_config.json: its chat template is not a text"):
        find_template(tmp_path)
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    settings.write_text(json.dumps({"chat_template": several}))
    assert find_template(tmp_path) == "named"
    (tmp_path / "chat_template.jinja").write_text("its own file")
    assert find_template(tmp_path) == "its own file"


def test_the_template_stays_in_the_one_file(tiny_model, tmp_path):
    write_hf(tmp_path / "hf", tiny_model(1, **{**LLAMA, "vocab_size": 269, "classifiers": ()}))
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(json_content()))
    (tmp_path / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    assert "with its tokenizer and chat template" in convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    _, tokenizer = load_checkpoint(tmp_path / "out.pt")
    assert load_chat(tmp_path / "out.pt", tokenizer).template == TEMPLATE


# ---------------------------------------------------------------- the commands


def test_decode_answers_a_turn_and_ends_with_it(tiny_model, tmp_path, command, made):
    """The model ends no text by itself; a token that it would write is made the template's end of turn."""
    model = tiny_model(3, vocab_size=SIZE, max_len=128, tie_embeddings=False)
    prompt = made.encode(conversation("hi"))
    plain = decode.DecodeConfig(max_new_tokens=9)
    free = decode.generate(model, prompt, plain).tokens
    with torch.no_grad():
        later = next(token for token in free[2:] if token not in free[:2])
        model.unembedding.weight[258] = 1.01 * model.unembedding.weight[later]
    save_checkpoint(tmp_path / "chat.pt", model, bytes_tokenizer().to_blob(), chat_template=TEMPLATE)
    expected = decode.generate(model, prompt, replace(plain, stop_tokens=(258,))).tokens
    assert expected[-1] == 258 and 2 < len(expected) < 9
    words = ["--checkpoint", str(tmp_path / "chat.pt"), "--prompt", "hi", "--confidence", "none", "--max-new-tokens", "9"]
    printed, _, _ = command(decode.main, *words, "--chat", "--trace", tmp_path / "trace")
    rows = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    assert [row["id"] for row in rows] == expected and printed.startswith("hi\n")


def test_inputs_of_a_task_are_turns_and_so_are_the_shots(made):
    tokenizer = bytes_tokenizer()
    task = replace(find_task("e2e").with_shots([Example("a", ("A.", "other"))]), chat=made)
    text = (
        "<|start|>user\nFacts: a\nSentence:<|stop|>\n<|start|>assistant\nA.<|stop|>\n"
        "<|start|>user\nFacts: b\nSentence:<|stop|>\n<|start|>assistant\n"
    )
    assert task.text("b", tokenizer) == text
    assert task.encode("b", tokenizer, 200) == (tokenizer.encode(text, special=True), False)
    assert task.stop_tokens(tokenizer) == (258,)


def test_a_long_prompt_loses_its_left_and_the_turns_around_it_stay(made):
    task, tokenizer = replace(Task("t", {}, ""), chat=made), bytes_tokenizer()
    around = len(made.encode(conversation("")))
    short, cut = task.encode("0123456789", tokenizer, around + 4)
    assert cut and short == made.encode(conversation("6789"))
    with pytest.raises(UserError, match="leave no room for it; use fewer --shots"):
        task.encode("0123456789", tokenizer, around - 1)
