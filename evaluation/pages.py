"""What `eval.py --html` shows: some inputs of a task, each decoded by all configurations of the table
(decoding/page.py)."""

from decode import stream
from decoding.page import Page
from decoding.replay import Recorder
from evaluation.inputs import Setup, Table, encode_inputs


def add_to_page(page: Page, setup: Setup, table: Table, places: tuple[int, ...]) -> None:
    """The inputs at these places, counted from 1, decoded in runs of their own by the full model and by the
    configurations; not by those with another model, whose layers the page does not know."""
    examples = [table.examples[place - 1] for place in places if place <= len(table.examples)]
    prompts, configurations = encode_inputs(setup, table.task, examples, table.configurations)
    for example, prompt in zip(examples, prompts):
        runs = {}
        for name, each in configurations.items():
            if each.model is setup.model:
                recorder = Recorder()
                list(recorder.watch(stream(setup.model, prompt, each.decode, recorder)))
                runs[name] = each.decode, recorder
        page.add(table.task.text(example.prompt, page.tokenizer), prompt, runs, example.references)
