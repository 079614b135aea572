"""Real checkpoints against their references, by hand: skipped unless EARLY_EXIT_REAL names a folder with
*.gguf files (the Llama family and Gemma), and perhaps *.txt to tokenize. It needs gguf, transformers,
accelerate and llama-cpp-python, some GB of memory, and a minute a file:

    EARLY_EXIT_REAL=FOLDER python -m pytest tests/test_real.py -s
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from convert import convert
from decode import generate, load_checkpoint
from decoding.settings import DecodeConfig
from formats.data import read_pairs
from formats.tokenizers.tokenizer import encode_prompt

FOLDER = os.environ.get("EARLY_EXIT_REAL")
POSITIONS, NEW = 700, 64  # positions: more than Gemma's window of 512
pytestmark = pytest.mark.skipif(not FOLDER, reason="EARLY_EXIT_REAL names no folder of real checkpoints")
DATA = Path(__file__).parent.parent / "data"


def english(count: int) -> list[str]:
    return [text for _, text in read_pairs(DATA / "e2e" / "train.csv.xz")][:count]


@pytest.fixture(
    scope="module", params=sorted(Path(FOLDER).glob("*.gguf")) if FOLDER else [], ids=lambda path: getattr(path, "stem", "none")
)
def case(request, tmp_path_factory):
    """(GGUF file, our model in float32, our tokenizer or None, token ids of a text, logits of our full
    pass)."""
    torch.set_num_threads(os.cpu_count())
    out = tmp_path_factory.mktemp("real") / "model.pt"
    print(convert(request.param, out, torch.float32))
    model, tokenizer = load_checkpoint(out)
    if tokenizer:
        tokens = encode_prompt(tokenizer, "\n".join(english(100)))
    else:
        from transformers import AutoTokenizer

        reference = AutoTokenizer.from_pretrained(FOLDER, gguf_file=request.param.name)
        tokens = reference("\n".join(english(100)))["input_ids"]
    tokens = tokens[:POSITIONS]
    assert len(tokens) == POSITIONS
    with torch.inference_mode():
        yield request.param, model, tokenizer, tokens, model(torch.tensor([tokens]))[0]
    torch.set_num_threads(1)


def test_logits_and_greedy_text_equal_those_of_transformers(case):
    from transformers import AutoModelForCausalLM

    path, model, _, tokens, logits = case
    reference = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0].float()
        print(f"{path.stem}: largest difference of a logit {(logits - expected).abs().max():.1e}")
        assert (logits - expected).abs().max() < 2e-3 and torch.equal(logits.argmax(-1), expected.argmax(-1))
        prompt = torch.tensor([tokens[:600]])
        text = reference.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[0, 600:].tolist()
    model.config = replace(model.config, eos_id=None)  # no end of text, as in the reference
    assert generate(model, tokens[:600], DecodeConfig(max_new_tokens=NEW)).tokens == text


def test_the_tokenizer_equals_that_of_llama_cpp(case):
    import llama_cpp

    path, _, tokenizer, _, _ = case
    if tokenizer is None:
        pytest.skip("byte-level BPE")
    reference = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    hard = ["Grüße, Café", "👍🏽 emoji 🧑‍🚀", "日本語 中文 한국어", "a\nb\n\n\nc\n", "  two   three    spaces ", "\ttab", "<b>x</b> ⟨?⟩"]
    german = [text for text, _ in read_pairs(DATA / "translation" / "train.tsv.xz")][:2000]
    files = [paragraph for file in sorted(Path(FOLDER).glob("*.txt")) for paragraph in re.split("(?<=\n\n)", file.read_text("utf-8"))]
    for text in [*hard, *english(2000), *german, *files]:
        ids = tokenizer.encode(text)
        assert ids == reference.tokenize(text.encode(), add_bos=False, special=False), text[:100]
        assert tokenizer.decode(ids) == text
    print(f"{path.stem}: the same tokens on {len(files)} paragraphs of *.txt")
