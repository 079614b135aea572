"""The early exit of transformers (`assistant_early_exit`) and verified decoding here, on the same model.

    python -m tests.compare_transformers runs/exits/model.pt --exits 10 15

The model must be of the Llama family, and its exits must share its final norm, because transformers knows no other. Both programs
decode the same inputs of E2E in one process, in turns, in float32. Beam search, which is not a part of this project, shows how much
of a score is lost to greedy decoding. The comparison needs the package transformers.
"""

import common.threads  # noqa: F401  sets variables that torch reads

import tempfile
import time
from dataclasses import replace
from operator import eq
from pathlib import Path

import torch

from common.errors import UserError
from common.errors import run as run_command
from common.flags import Parser
from decode import generate, load_checkpoint
from decoding.drafting import Drafting
from decoding.settings import DecodeConfig
from evaluation.metrics import METRICS
from evaluation.tasks import find_task, read_task, sample
from model import Transformer, check_exit_layers
from tests.public import write_hf


def exported(checkpoint: str):
    """The model in transformers, by way of a Hugging Face folder. Raises UserError without transformers, and for exits that it does
    not know."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("this comparison needs transformers: pip install transformers") from None
    model, _ = load_checkpoint(checkpoint, dtype=torch.float32, form="plain")
    if model.config.exit_norms:
        raise UserError(f"{checkpoint}: its exits have norms of their own, which transformers does not know")
    bare = Transformer(replace(model.config, exit_norms=(), classifiers=()))
    bare.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in bare.state_dict()})
    with tempfile.TemporaryDirectory() as folder:
        write_hf(Path(folder), bare)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def generations(checkpoint: str, exits: list[int], shortlist: int, most: int) -> tuple[dict, object]:
    """Functions from a prompt's token ids to those of its answer, by name; and the tokenizer."""
    model, tokenizer = load_checkpoint(checkpoint, dtype=torch.float32)
    check_exit_layers("exits", exits, model.config.n_layers)
    theirs = exported(checkpoint)
    full = DecodeConfig(max_new_tokens=most)
    auto = replace(full, confidence="softmax", verify=True, draft="auto", shortlist=shortlist)
    drafting = Drafting.of(model, auto)

    def by_transformers(**options):
        def run(prompt: list[int]) -> list[int]:
            ids = torch.tensor([prompt])
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most, **options)
            return out[0, len(prompt) :].tolist()

        return run

    runs = {
        "here, full": lambda prompt: generate(model, prompt, full).tokens,
        "here, verified auto": lambda prompt: generate(model, prompt, auto, drafting=drafting).tokens,
        "transformers, full": by_transformers(),
        "transformers, 5 beams": by_transformers(num_beams=5),
    }
    return runs | {f"transformers, exit at {layer}": by_transformers(assistant_early_exit=layer) for layer in exits}, tokenizer


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--exits", type=int, nargs="*", default=[], help="exit layers for transformers")
    parser.add_argument("--limit", type=int, default=12, help="inputs, 0 for all (default: %(default)s)")
    parser.add_argument("--shortlist", type=int, default=2048, help="ids that a check here looks at (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="of an answer (default: %(default)s)")
    args = parser.parse_args()
    runs, tokenizer = generations(args.checkpoint, args.exits, args.shortlist, args.max_new_tokens)
    task = find_task("e2e")
    examples = sample(read_task(task, "test"), args.limit, seed=0)
    prompts = [task.encode(example.prompt, tokenizer, room=1000)[0] for example in examples]
    seconds, answers = dict.fromkeys(runs, 0), {name: [] for name in runs}
    for run in runs.values():
        run(prompts[0])  # once without a clock
    for prompt in prompts:
        for name, run in runs.items():
            begin = time.perf_counter()
            ids = run(prompt)
            seconds[name] += time.perf_counter() - begin
            answers[name].append([id for id in ids if id not in tokenizer.ends])
    for name, found in answers.items():
        own = seconds["here, full" if name.startswith("here") else "transformers, full"]
        times = f"{1000 * seconds[name] / sum(map(len, found)):5.1f} ms per token, {own / seconds[name]:.2f} times its own full model"
        same = sum(map(eq, found, answers["here, full"]))
        texts, references = [tokenizer.decode(answer).strip() for answer in found], [example.references for example in examples]
        scores = [f"{score} {100 * METRICS[metric](texts, references):.1f}" for score, metric in task.metrics.items()]
        print(f"{name:24} {times}, {same} of {len(prompts)} texts the same, {', '.join(scores)}")


if __name__ == "__main__":
    run_command(main)
