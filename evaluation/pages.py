"""What `eval.py --html` shows: some inputs of a task, each decoded by all configurations of the table
(decoding/page.py)."""

from decode import stream
from decoding.page import Page
from decoding.replay import Recorder
from evaluation.inputs import Table, encode_inputs
from evaluation.measure import with_full_model


def add_to_page(page: Page, table: Table, places: tuple[int, ...]) -> None:
    """The inputs at these places, counted from 1, decoded in runs of their own by the full model and by the
    configurations; not by those with another model, whose layers the page does not know."""
    configurations = with_full_model(page.model, table.configurations)
    configurations = {name: each for name, each in configurations.items() if each.model is page.model}
    examples = [table.examples[place - 1] for place in places if place <= len(table.examples)]
    prompts, configurations = encode_inputs(page.tokenizer, table.task, examples, configurations)
    for example, prompt in zip(examples, prompts):
        runs = {}
        for name, each in configurations.items():
            recorder = Recorder()
            list(recorder.watch(stream(page.model, prompt, each.decode, recorder)))
            runs[name] = each.decode, recorder
        page.add(table.task.text(example.prompt, page.tokenizer), prompt, runs, example.references)
