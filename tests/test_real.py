"""Real checkpoints against their references, by hand: skipped unless EARLY_EXIT_REAL names a folder with
*.gguf files (the Llama family and Gemma), and perhaps *.txt to tokenize. It needs gguf, transformers,
accelerate and llama-cpp-python, some GB of memory, and a minute a file:

    EARLY_EXIT_REAL=FOLDER python -m pytest tests/test_real.py -s
"""

import os
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch

from convert import convert
from decode import generate
from decoding.settings import DecodeConfig
from formats.data import read_pairs
from formats.tokenizer import encode_prompt
from model import load_checkpoint

FOLDER = os.environ.get("EARLY_EXIT_REAL")
POSITIONS, NEW, TOLERANCE = 700, 64, 2e-3  # positions: more than Gemma's window of 512
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


def compare(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    worst, same = (ours - theirs).abs().max().item(), int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    print(f"{name}: largest difference of a logit {worst:.1e}, same argmax at {same} of {len(ours)} positions")
    assert worst < tolerance and same == len(ours)


def test_logits_and_greedy_text_equal_those_of_transformers(case):
    from transformers import AutoModelForCausalLM

    path, model, _, tokens, logits = case
    reference = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        compare(f"{path.stem}, transformers", logits, reference(torch.tensor([tokens])).logits[0].float())
        prompt = torch.tensor([tokens[:600]])
        text = reference.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[0, 600:].tolist()
    model.config = replace(model.config, eos_id=None)  # no end of text, as in the reference
    assert generate(model, tokens[:600], DecodeConfig(max_new_tokens=NEW)).tokens == text


def test_logits_equal_those_of_llama_cpp(case, tmp_path):
    """llama.cpp on the same weights, dequantized, with a float32 cache. It looks GELU up in a table of
    half-precision numbers (ggml's GGML_GELU_FP16), which moves Gemma's logits by some 0.03; built without the
    table it meets the tolerance."""
    import llama_cpp

    path, model, _, tokens, logits = case
    dequantize(path, tmp_path / "float32.gguf")
    reference = llama_cpp.Llama(
        str(tmp_path / "float32.gguf"), n_ctx=1024, n_batch=1024, n_ubatch=1024, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False,
    )  # fmt: skip
    reference.eval(tokens)
    tolerance = 0.1 if model.config.activation == "gelu_tanh" else TOLERANCE
    compare(f"{path.stem}, llama.cpp", logits, torch.from_numpy(reference.scores[:POSITIONS]).float(), tolerance)


def dequantize(path: Path, out: Path) -> None:
    """Writes a GGUF file with all weights as float32."""
    import gguf

    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def eight_bits(path: Path, out: Path) -> None:
    """Writes a GGUF file of float32 with its matrices as Q8_0."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = 7, os.cpu_count()  # LLAMA_FTYPE_MOSTLY_Q8_0
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), settings) == 0


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


def read_speed() -> float:
    """Bytes a second that all threads together read from memory."""
    block, times = torch.ones(2**28), []
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - started)
    return block.nbytes / min(times)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("path", sorted(Path(FOLDER).glob("*.gguf")) if FOLDER else [], ids=lambda path: getattr(path, "stem", "none"))
def test_speed_is_printed_beside_that_of_transformers_and_llama_cpp(path, dtype, tmp_path):
    """64 greedy tokens after 32, in turn, medians of five turns; here also in int8, and llama.cpp on the file
    as it is, of four bits, and in eight. Of this project and transformers the first two have the same weights
    and dtype."""
    import llama_cpp
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count())
    convert(path, tmp_path / "model.pt", dtype)
    model, tokenizer = load_checkpoint(tmp_path / "model.pt", dtype=dtype)
    model.config = replace(model.config, eos_id=None)
    reference = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=path.name, dtype=dtype).eval()
    small, _ = load_checkpoint(tmp_path / "model.pt", dtype=torch.int8)
    small.config = model.config
    dequantize(path, tmp_path / "whole.gguf")
    eight_bits(tmp_path / "whole.gguf", tmp_path / "eight.gguf")
    options = {"n_ctx": 256, "n_threads": os.cpu_count(), "verbose": False}
    four, eight = (llama_cpp.Llama(str(file), **options) for file in (path, tmp_path / "eight.gguf"))
    prompt = tokenizer.encode(" ".join(english(5)))[:32] if tokenizer else list(range(1000, 1032))

    def ours(model) -> None:
        generate(model, prompt, DecodeConfig(max_new_tokens=NEW))

    def theirs() -> None:
        with torch.inference_mode():
            reference.generate(torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

    def cpp(quantized) -> None:
        quantized.reset()
        stream = quantized.generate(prompt, temp=0.0, repeat_penalty=1.0)
        for _ in range(NEW):
            next(stream)

    actions, times = {"this project": partial(ours, model), "in int8": partial(ours, small), "transformers": theirs}, {}
    actions |= {"llama.cpp Q8_0": partial(cpp, eight), "llama.cpp, the file": partial(cpp, four)}
    for turn in range(6):  # the first warms up
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            times.setdefault(name, []).extend([time.perf_counter() - started] * bool(turn))
    speed = {name: NEW / median(values) for name, values in times.items()}
    weights = sum(weight.numel() * weight.element_size() for block in model.blocks for weight in block.parameters())
    share = (weights + model.unembed.nbytes) * speed["this project"] / read_speed()
    figures = ", ".join(f"{name} {value:.1f}" for name, value in speed.items())
    ratio = speed["this project"] / speed["transformers"]
    print(f"{path.stem}, {dtype}, {os.cpu_count()} threads: {figures} tokens/s")
    print(f"{ratio:.2f} times transformers, {share:.0%} of what memory gives")
    torch.set_num_threads(1)


LLAMAS = sorted(Path(FOLDER).glob("*[Ll][Mm]*.gguf")) if FOLDER else []


@pytest.mark.parametrize("path", LLAMAS, ids=lambda path: getattr(path, "stem", "none"))
def test_early_exit_speed_is_printed_beside_that_of_transformers(path, tmp_path):
    """48 greedy tokens after each of 8 texts, in turn, float32, drafts from the layer at two thirds of the
    depth: transformers by its own `assistant_early_exit` (self-speculation after LayerSkip), this project
    with the model's own head there, choosing by measurement, and where EARLY_EXIT_HEADS names a file, with
    trained heads and their shortlist."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count())
    convert(path, tmp_path / "model.pt", torch.float32)
    model, tokenizer = load_checkpoint(tmp_path / "model.pt")
    reference = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=path.name, dtype=torch.float32).eval()
    layer, length = 2 * model.config.n_layers // 3, 48
    model.config = replace(model.config, eos_id=None)
    prompts = [tokenizer.encode(" ".join(english(5 * i + 5)[-5:]))[:64] for i in range(8)]
    draft = DecodeConfig(
        max_new_tokens=length, confidence="softmax", threshold=0.7, exit_layers=(layer,), verify=True, max_owed=6, prune="fixed"
    )

    def theirs(prompt: list[int], **options) -> list[int]:
        with torch.inference_mode():
            lengths = {"max_new_tokens": length, "min_new_tokens": length}
            out = reference.generate(torch.tensor([prompt]), do_sample=False, **lengths, **options)
        return out[0, len(prompt) :].tolist()

    def ours(model, config: DecodeConfig, prompt: list[int]) -> list[int]:
        return generate(model, prompt, config).tokens

    rows = {
        "transformers": theirs, "transformers, early exit": partial(theirs, assistant_early_exit=layer),
        "this project": partial(ours, model, draft.full()), "drafts": partial(ours, model, draft),
        "auto": partial(ours, model, replace(draft, draft="auto", exit_layers=None, max_owed=None)),
    }  # fmt: skip
    if os.environ.get("EARLY_EXIT_HEADS"):
        trained, _ = load_checkpoint(tmp_path / "model.pt", heads=os.environ["EARLY_EXIT_HEADS"])
        trained.config = replace(trained.config, eos_id=None)
        size = None if trained.frequent_ids is None else min(8192, len(trained.frequent_ids))
        rows["drafts, trained heads"] = partial(ours, trained, replace(draft, shortlist=size))
    times, texts = {name: 0.0 for name in rows}, {name: [] for name in rows}
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first warms up
        for name, action in rows.items():
            started = time.perf_counter()
            texts[name].append(action(prompt))
            times[name] += (time.perf_counter() - started) * bool(number)
    print(f"{path.stem}, float32, {os.cpu_count()} threads, drafts from layer {layer} of {model.config.n_layers}")
    for name, seconds in times.items():
        base = times["transformers" if name.startswith("transformers") else "this project"]
        print(f"  {name}: {len(prompts) * length / seconds:.1f} tokens/s, {base / seconds:.2f} times full depth")
    assert all(text == texts["this project"] for text in texts.values())
    torch.set_num_threads(1)
