"""The page: runs of one or several prompts as one HTML file that needs nothing else. page.html is its
template; here what it shows is collected, as JSON. All that a run did not compute itself, the logit lens
above all, is computed from its finished text afterwards, so that the times shown are the run's own.

L layers, T positions, V vocabulary, d model width.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from common.files import whole_file
from confidence import jensen_shannon
from decoding.display import layer_colour, piece, pieces
from decoding.record import Token, first_difference
from decoding.replay import Emitted, Pass, Recorder
from decoding.settings import DecodeConfig
from model import Transformer

TEMPLATE = Path(__file__).with_name("page.html")
BEST = 5  # tokens shown of every layer


class Page:
    """Runs to be shown: `add` a prompt with its runs, then `write`."""

    def __init__(self, model: Transformer, tokenizer, name: str):
        """`name`: what the page calls the model."""
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.inputs: list[dict] = []
        self.passes: list[Pass] = []
        self.shown: set[int] = set()  # token ids

    def add(
        self,
        title: str,
        prompt: list[int],
        runs: dict[str, tuple[DecodeConfig, Recorder]],
        references: Sequence[str] = (),
    ) -> None:
        """A prompt, its text or name as `title`, and what became of it under several settings, the first of
        which is the full model. `references`: right answers."""
        full = next(iter(runs.values()))[1].settled
        rows = [self.run(name, config, recorder, prompt, full) for name, (config, recorder) in runs.items()]
        self.inputs.append({"title": title, "prompt": prompt, "runs": rows, "references": list(references)})
        self.shown.update(prompt)

    def run(
        self, name: str, config: DecodeConfig, recorder: Recorder, prompt: list[int], full: list[Token]
    ) -> dict:
        """One run."""
        self.passes += recorder.passes
        tokens = self.tokens(recorder, prompt)
        ids, wanted = [[token.id for token in text] for text in (recorder.settled, full)]
        return {
            "name": name,
            "settings": config.describe(self.model.config),
            "confidence": config.confidence,
            "verify": config.verify,
            "copied": config.fill == "copy",
            "temperature": config.temperature,
            "contrast": config.predict == "contrast",
            "tokens": tokens,
            "difference": first_difference(ids, wanted),
            "passes": [pass_row(each) for each in recorder.passes],
        }

    def tokens(self, recorder: Recorder, prompt: list[int]) -> list[dict]:
        """The tokens of a run in the order of the text, drafts that were rolled back before what replaced
        them."""
        texts = [text for _, text in pieces(self.tokenizer, iter(recorder.settled))]
        rows, lost, text = [], [], list(prompt)
        for each in recorder.emitted:
            row = self.token_row(each)
            rows.append(row)
            if each.rolled_back:
                lost.append((each, row))
                continue
            row["text"] = texts.pop(0)
            self.read_lost(text, lost)
            lost = []
            text.append(each.token.id)
        settled = [(each, row) for each, row in zip(recorder.emitted, rows) if not each.rolled_back]
        self.read(text, settled)
        return rows

    def token_row(self, each: Emitted) -> dict:
        """What is known of a token without its lens. `asked`: whether the questions of its pass were about
        it; a token in the place of a draft comes from a pass that asked about a later position."""
        token = each.token
        self.shown.add(token.id)
        return {
            "id": token.id,
            "text": piece(self.tokenizer, token.id),
            "at": each.at,
            "layer": token.exit_layer,
            "made": each.made,
            "settled": each.settled,
            "lost": each.rolled_back,
            "asked": not token.rolled_back,
            "amateurs": token.amateurs,
        }

    def read_lost(self, text: list[int], lost: list[tuple[Emitted, dict]]) -> None:
        """The lens of drafts that were rolled back, on the text as it was then."""
        if lost:
            self.read(text + [each.token.id for each, _ in lost], lost)

    @torch.inference_mode()
    def read(self, text: list[int], tokens: list[tuple[Emitted, dict]]) -> None:
        """Adds to the rows of tokens of `text` what every layer would have said in their place."""
        states = self.model.hidden_states(torch.tensor([text[:-1]], device=self.model.embedding.device))
        for each, row in tokens:
            log_p = layer_log_probs(self.model, states, each.at - 1)
            best = log_p.topk(BEST)
            row["best"] = [
                flat(ids, probs) for ids, probs in zip(best.indices.tolist(), best.values.exp().tolist())
            ]
            row["jsd"] = [short(value) for value in jensen_shannon(log_p[row["layer"] - 1], log_p).tolist()]
            self.shown.update(best.indices.flatten().tolist())

    def content(self) -> dict:
        """All that the page shows."""
        L = self.model.config.n_layers
        return {
            "model": self.name,
            "layers": L,
            "vocabulary": self.model.config.vocab_size,
            "device": str(self.model.embedding.device),
            "threads": torch.get_num_threads(),
            "colours": [layer_colour(layer, L) for layer in range(1, L + 1)],
            "pieces": {token: piece(self.tokenizer, token) for token in sorted(self.shown)},
            "row_times": row_times(self.passes) if self.model.embedding.device.type == "cpu" else [],
            "inputs": self.inputs,
        }

    def write(self, path) -> None:
        """Writes the file, whole or not at all."""
        html = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", script_json(self.content()), 1)
        with whole_file(path) as part:
            Path(part).write_text(html, encoding="utf-8")


# ---------------------------------------------------------------- parts of it


def pass_row(each: Pass) -> dict:
    """One pass."""
    asked = {
        layer: [short(confidence), short(threshold), n, amateur]
        for layer, (confidence, threshold, n, amateur) in each.asked.items()
    }
    return {
        "before": each.before,
        "after": each.after,
        "stop": each.stop,
        "reached": each.reached,
        "asked": asked,
        "drafted": each.drafted,
        "kept": each.kept,
        "seconds": short(each.seconds),
        "runs": each.block_runs,
        "flops": each.flops,
    }


def row_times(passes: list[Pass]) -> list[tuple[int, float, int]]:
    """(rows, median seconds that a block took for them, how many blocks), by rows."""
    times: dict[int, list[float]] = {}
    for each in passes:
        for layer, seconds in each.block_seconds.items():
            if each.rows(layer):
                times.setdefault(each.rows(layer), []).append(seconds)
    return [(rows, short(median(times[rows])), len(times[rows])) for rows in sorted(times)]


@torch.inference_mode()
def layer_log_probs(model: Transformer, states: list[Tensor], position: int) -> Tensor:
    """log p_1 .. log p_L of the token after `position`: the logit lens with each exit's own norm. (L, V)."""
    rows = [
        model.exit_norm(state[position : position + 1], layer) for layer, state in enumerate(states[1:], 1)
    ]
    return model.score(torch.cat(rows), model.head_weight).log_softmax(-1)


def flat(ids: list[int], probs: list[float]) -> list[float]:
    """id, probability, id, probability, .."""
    row = []
    for token, probability in zip(ids, probs):
        row += [token, round(probability, 4)]
    return row


def short(value: float | None) -> float | None:
    """Four digits of it."""
    return None if value is None else float(f"{value:.4g}")


def script_json(content: dict) -> str:
    """JSON that can stand in a script element, whatever texts it holds: no `<` can end the element or begin
    another."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
