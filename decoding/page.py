"""The page: runs of one or several prompts as one HTML file that needs nothing else. page.html is its
template; this file collects the data that it shows, as JSON. What the runs did not compute themselves, above
all the logit lens, is computed here from their finished texts.

L layers, T positions, V vocabulary, d model width.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from common.files import whole_file
from confidence import jensen_shannon
from decoding.display import figures, in_force, layer_colour, piece, pieces
from decoding.record import first_difference
from decoding.replay import Emitted, Recorder
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
        self.shown: set[int] = set()  # token ids

    def add(self, title: str, prompt: list[int], runs: dict, references=(), speeds=()) -> None:
        """Adds a prompt, with its text or name as `title`. `runs` holds the settings (DecodeConfig) and the
        Recorder of each run by name; the first run is the full model's. `references` are right answers;
        `speeds` say in words how fast each run is, if that was measured."""
        rows, texts = [], [[token.id for token in recorder.settled] for _, recorder in runs.values()]
        for (name, (config, recorder)), text, speed in zip(runs.items(), texts, speeds or [""] * len(runs)):
            compared = {"difference": first_difference(text, texts[0]), "speed": speed}
            rows.append(self.run(name, config, recorder, prompt) | compared)
        self.inputs.append({"title": title, "prompt": prompt, "runs": rows, "references": list(references)})
        self.shown.update(prompt)

    def run(self, name: str, config: DecodeConfig, recorder: Recorder, prompt: list[int]) -> dict:
        """The data of one run."""
        return {
            "name": name,
            "settings": in_force(config, self.model.config),
            "figures": figures(recorder, self.model.config.n_layers),
            "verify": config.verify,
            "copied": config.fill == "copy",
            "temperature": config.temperature,
            "contrast": config.predict != "own",
            "tokens": self.tokens(recorder, prompt),
            "passes": [asdict(each) for each in recorder.passes],
        }

    def tokens(self, recorder: Recorder, prompt: list[int]) -> list[dict]:
        """The tokens of a run in the order of the text, with drafts that were rolled back before the tokens
        that replaced them."""
        texts = (text for _, text in pieces(self.tokenizer, iter(recorder.settled)))
        rows, lost, settled, text = [], [], [], list(prompt)
        for each in recorder.emitted:
            token = each.token
            row = {"id": token.id, "at": each.at, "made": each.made, "settled": each.settled}
            row |= {"layer": token.exit_layer, "lost": each.rolled_back, "amateurs": token.amateurs}
            # Whether the checks of its pass were about this token; a token that replaced a draft comes from a
            # pass that checked a later position:
            row["checked"] = not token.rolled_back
            rows.append(row)
            if each.rolled_back:
                row["text"] = piece(self.tokenizer, token.id)
                lost.append((each, row))
                continue
            if lost:  # the logit lens needs the text as it was then
                self.read(text + [draft.token.id for draft, _ in lost], lost)
                lost = []
            row["text"] = next(texts)
            settled.append((each, row))
            text.append(token.id)
        self.read(text, settled)
        self.shown.update(row["id"] for row in rows)
        return rows

    @torch.inference_mode()
    def read(self, text: list[int], tokens: list[tuple[Emitted, dict]]) -> None:
        """Adds to the rows of `tokens`, which belong to `text`, what every layer would have predicted in
        their place (the logit lens, with each exit's own norm)."""
        ids = torch.tensor([text[:-1]], device=self.model.device)
        states = self.model.hidden_states(ids)[1:]  # h_1 .. h_L, (1, T, d) each
        for each, row in tokens:
            before = slice(each.at - 1, each.at)  # the position that predicts the token
            normed = [self.model.exit_norm(h[0, before], layer) for layer, h in enumerate(states, 1)]
            log_p = self.model.score(torch.cat(normed)).log_softmax(-1)  # (L, V)
            best = log_p.topk(BEST)
            layers = zip(best.indices.tolist(), best.values.exp().tolist())
            row["best"] = [[(token, round(p, 4)) for token, p in zip(*layer)] for layer in layers]
            distances = jensen_shannon(log_p[row["layer"] - 1], log_p)
            row["jsd"] = [round(distance, 4) for distance in distances.tolist()]
            self.shown.update(best.indices.flatten().tolist())

    def content(self) -> dict:
        """All that the page shows."""
        L = self.model.config.n_layers
        return {
            "model": self.name,
            "layers": L,
            "vocabulary": self.model.config.vocab_size,
            "device": str(self.model.device),
            "threads": torch.get_num_threads(),
            "colours": [layer_colour(layer, L) for layer in range(1, L + 1)],
            "pieces": {token: piece(self.tokenizer, token) for token in sorted(self.shown)},
            "inputs": self.inputs,
        }

    def write(self, path) -> None:
        """Writes the file, whole or not at all."""
        html = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", script_json(self.content()), 1)
        with whole_file(path) as part:
            Path(part).write_text(html, encoding="utf-8")


def script_json(content: dict) -> str:
    """JSON that can be put into a script element, whatever text it contains: no `<` can end the element or
    begin another."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
