"""The page: what is remembered of a run equals the run, what the page computes afterwards equals what the
exits saw, and a browser shows it."""

import json
import sys

import pytest
from browser import Browser, find_chromium

import decode
from decode import Run, generate, stream
from decoding.display import steps
from decoding.page import Page, script_json
from decoding.record import first_difference
from decoding.replay import Recorder
from decoding.settings import DecodeConfig

PROMPT = [1, 7, 3, 9]
EARLY = {"max_new_tokens": 24, "confidence": "softmax", "exit_layers": (1, 2, 4)}
SETTINGS = {
    "full": DecodeConfig(max_new_tokens=24),
    "lossy": DecodeConfig(**EARLY, threshold=0.1),
    "pruned": DecodeConfig(**EARLY, threshold=0.1, prune="fixed:8"),
    "fixed exit": DecodeConfig(max_new_tokens=24, confidence="softmax", exit_layers=(2,), threshold=0.0),
    "bounded": DecodeConfig(**EARLY, threshold=0.1, max_owed=3),
    "copied": DecodeConfig(**EARLY, threshold=0.1, fill="copy"),
    "learned": DecodeConfig(**EARLY, threshold=0.1, threshold_schedule="adaptive"),
    "contrasted": DecodeConfig(**{**EARLY, "confidence": "jsd"}, threshold=0.05, predict="acd"),
    "verified": DecodeConfig(**EARLY, threshold=0.1, verify=True),
    "verified, bounded": DecodeConfig(**EARLY, threshold=0.1, verify=True, max_owed=3),
    "verified, drawn": DecodeConfig(**EARLY, threshold=0.1, verify=True, temperature=1.0, top_p=0.9, seed=9),
}
each_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)


def recorded(model, prompt, config):
    """The record of a run."""
    recorder = Recorder()
    for _ in recorder.watch(stream(model, prompt, config, recorder)):
        pass
    return recorder


# ---------------------------------------------------------------- what is remembered


@each_setting
def test_every_pass_is_remembered_as_the_staircase_was(tiny_model, monkeypatch, config):
    """The heights before and after each pass, by watching the run itself."""
    before, reached, runs = [], [], []

    def advance(run, tokens, exits, original=Run.advance):
        before.append(run.cache.heights())
        trace, layer = original(run, tokens, exits)
        reached.append(layer)
        runs.append(run)
        return trace, layer

    monkeypatch.setattr(Run, "advance", advance)
    recorder = recorded(tiny_model(8), PROMPT, config)
    assert [each.before for each in recorder.passes] == before
    assert [each.reached for each in recorder.passes] == reached
    assert [each.after for each in recorder.passes] == [*before[1:], runs[-1].cache.heights()]
    assert recorder.heights == runs[-1].cache.heights()


def test_what_drafting_by_measurement_explores_is_part_of_the_pass(tiny_model):
    recorder = recorded(tiny_model(8), PROMPT, DecodeConfig(max_new_tokens=30, confidence="softmax", verify=True, draft="auto"))
    assert recorder.passes[-1].flops == recorder.block_flops + recorder.head_flops
    assert [each.flops for each in recorder.passes] == sorted(each.flops for each in recorder.passes)


@each_setting
def test_watching_changes_neither_text_nor_work(tiny_model, config):
    model = tiny_model(8)
    recorder, out = recorded(model, PROMPT, config), generate(model, PROMPT, config)
    assert [token.id for token in recorder.settled] == out.tokens
    assert [token.exit_layer for token in recorder.settled] == out.exit_layers
    for name, value in vars(out.counters).items():
        assert getattr(recorder, name) == value, name
    last = recorder.passes[-1]
    assert last.block_runs == out.counters.block_runs
    assert last.flops == out.counters.block_flops + out.counters.head_flops


@each_setting
def test_every_token_is_told_with_the_passes_that_made_and_settled_it(tiny_model, config):
    """A draft comes from the pass that read the token before it, and stopped at the draft's layer; what the
    full model puts in a draft's place comes from the pass that judged."""
    recorder = recorded(tiny_model(8), PROMPT, config)
    top, texts = 6, {}
    for each in recorder.emitted:
        made, settled = recorder.passes[each.made], recorder.passes[each.settled]
        assert min(made.reached, 5) == each.token.exit_layer
        assert each.made == each.settled or (made.reached < top == settled.reached and config.verify)
        if each.made == each.settled and settled.kept < settled.drafted:
            assert each.at == settled.after[0]  # the first position forgotten
        elif settled.reached < top or each.made < each.settled:
            assert each.at == made.stop
        assert each.at not in texts or texts[each.at].rolled_back
        texts[each.at] = each
    assert [texts[at].token for at in sorted(texts)][: len(recorder.settled)] == recorder.settled
    lost = sum(each.rolled_back for each in recorder.emitted)
    assert lost == recorder.drafted - recorder.accepted
    assert not config.verify or lost > 0


# ---------------------------------------------------------------- what the page computes


def page_of(model, names, tokenizer=None, title="the prompt", prompt=PROMPT):
    """A page of one prompt under some of SETTINGS, and the recorders by name."""
    recorders = {name: recorded(model, prompt, SETTINGS[name]) for name in names}
    page = Page(model, tokenizer, "tiny.pt")
    page.add(title, prompt, {name: (SETTINGS[name], recorder) for name, recorder in recorders.items()})
    return page, recorders


@pytest.mark.parametrize("name", ["lossy", "fixed exit", "verified", "verified, bounded"])
def test_the_lens_tells_what_the_exits_saw_of_rolled_back_drafts_too(tiny_model, name):
    """Greedy tokens are the best at the layer that they came from, in the table that is computed after the
    run, with the confidence that the run had."""
    page, _ = page_of(tiny_model(8), ["full", name])
    run = page.content()["inputs"][0]["runs"][1]
    assert name not in ("verified", "verified, bounded") or any(token["lost"] for token in run["tokens"])
    for token in run["tokens"]:
        (first, p), (_, q), *_ = token["best"][token["layer"] - 1]
        assert first == token["id"]
        assert token["jsd"][token["layer"] - 1] < 1e-6
        check = run["passes"][token["made"]]["checks"].get(token["layer"])
        if check and token["checked"] and check.confidence is not None:
            assert p - q == pytest.approx(check.confidence, abs=2e-3)


def test_confidence_checks_are_shown_with_the_candidates_left_and_the_layer_contrasted_with(tiny_model):
    page, _ = page_of(tiny_model(8), ["full", "pruned", "contrasted"])
    _, pruned, contrasted = page.content()["inputs"][0]["runs"]
    assert {check.candidates for each in pruned["passes"] for check in each["checks"].values()} == {8}
    amateurs = {layer: check.amateur for each in contrasted["passes"] for layer, check in each["checks"].items()}
    assert amateurs[1] is None and amateurs[4] in (2, 3)
    assert all(amateur < layer for token in contrasted["tokens"] for layer, amateur in token["amateurs"].items())


def test_json_in_a_script_ends_no_script():
    text = {"</script>": "<!--<script>"}
    assert "<" not in script_json(text) and json.loads(script_json(text)) == text


def test_the_command_prints_the_staircase_and_writes_the_page(tiny_model, monkeypatch, tmp_path, capsys):
    model = tiny_model(8)
    monkeypatch.setattr("decoding.command.load_checkpoint", lambda *_, **__: (model, None))
    flags = ["1,7,3,9", "--exit-layers", "1,2,4", "--threshold", "0.1", "--max-new-tokens", "9", "--prune", "none"]
    monkeypatch.setattr(sys, "argv", ["decode.py", *flags, "--staircase", "--html", str(tmp_path / "page.html")])
    decode.main()
    config = DecodeConfig(**{**EARLY, "max_new_tokens": 9}, threshold=0.1)
    recorder = recorded(model, PROMPT, config)
    lines = [line for line in capsys.readouterr().out.splitlines() if "×" in line]
    assert [line.split(None, 1)[1].strip() for line in lines] == [steps(each.after) for each in recorder.passes]
    assert max(map(len, lines)) <= 80
    shown = embedded(tmp_path / "page.html")
    assert [run["name"] for run in shown["inputs"][0]["runs"]] == ["full model", "softmax"]
    assert [token["id"] for token in shown["inputs"][0]["runs"][1]["tokens"]] == [token.id for token in recorder.settled]


def embedded(path):
    """What a page holds."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])


# ---------------------------------------------------------------- what a browser shows


EVIL = '</script><script>window.broken = 1</script><img src=x onerror="window.broken = 2">&amp;<!--'
NAMES = ["full", "lossy", "verified, bounded", "copied", "pruned", "verified, drawn"]


class Letters:
    """A tokenizer every piece of which is markup."""

    def decode(self, ids):
        return "".join(map(self.piece, ids))

    def piece(self, token):
        return f"<script>window.broken = {token}</script>"


@pytest.fixture(scope="module")
def browser():
    if find_chromium() is None:
        pytest.skip("no Chromium here, so the page is not opened (Debian: apt-get install chromium)")
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory):
    """A file with the page of NAMES, and the recorders by name."""
    page, recorders = page_of(tiny_model(8), NAMES, title=EVIL)
    path = tmp_path_factory.mktemp("page") / "page.html"
    page.write(path)
    return path, recorders


@pytest.fixture
def opened(browser, written):
    """The page of NAMES in the browser, and the recorders by name."""
    path, recorders = written
    browser.requests.clear()
    browser.errors.clear()
    browser.open(path)
    yield browser, recorders
    assert browser.errors == []
    assert set(browser.requests) == {path.as_uri()}  # and nothing from a network


def choose(browser, index):
    """Clicks on the heading of a run, then goes to its first pass."""
    browser.run(f"document.querySelectorAll('.run h3 button')[{index}].click()")
    browser.run("document.activeElement.blur()")
    browser.press("Home")


def read(browser, script):
    """The values of an expression of x, for all elements x of a selector: "'selector' => expression"."""
    selector, expression = script.split(" => ", 1)
    return browser.run(f"[...document.querySelectorAll({selector})].map(x => {expression})")


def of_tokens(browser, index, expression, kind=".token"):
    """The values of an expression of x, for all tokens x of a run."""
    return browser.run(f"[...document.querySelectorAll('.run')[{index}].querySelectorAll('{kind}')].map(x => {expression})")


def passed(browser):
    """The heading that says which pass is shown."""
    return browser.run("document.getElementById('pass').textContent")


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_stepping_through_the_staircase_shows_the_numbers_of_the_run(opened, index):
    browser, recorders = opened
    passes = recorders[NAMES[index]].passes
    choose(browser, index)
    for number, each in enumerate(passes, 1):
        assert passed(browser) == f"Pass {number} of {len(passes)}"
        assert read(browser, "'.filled li[data-step]' => +x.dataset.filled") == each.after[::-1]
        assert read(browser, "'.filled li[data-step] b' => +x.textContent") == each.after[::-1]
        assert read(browser, "'#meters .ours b' => +x.dataset.value") == [each.block_runs, each.flops]
        check_cells(browser, each, len(passes[0].before) - 2)
        story = browser.run("document.getElementById('story').textContent")
        assert "undefined" not in story and "NaN" not in story and "Infinity" not in story
        browser.press("ArrowRight")
    browser.press("ArrowLeft")
    assert passed(browser) == f"Pass {len(passes) - 1} of {len(passes)}"


def check_cells(browser, each, L):
    """The bars of a pass: what ran is as many rows as the pass had, what is owed is what is not filled, what
    is rolled back is what was begun and is no more."""
    cells = read(browser, "'.flight rect.cell' => [+x.dataset.step, +x.dataset.from, +x.dataset.to, x.dataset.kind]")
    for step in range(1, L + 2):
        bars = sorted((first, stop, kind) for at, first, stop, kind in cells if at == step)
        assert [first for first, _, _ in bars[1:]] == [stop for _, stop, _ in bars[:-1]]  # without gaps, from 0
        width = {kind: sum(stop - first for first, stop, k in bars if k == kind) for _, _, kind in bars}
        kept = max(0, each.after[step] - each.before[step]) if step <= each.reached else 0
        copied = step > each.reached and step <= L
        assert width.get("now", 0) == (0 if copied or step > each.reached else kept)
        assert width.get("owed", 0) == each.after[0] - each.after[step]
        ran = each.stop if step <= each.reached else each.before[step]
        assert width.get("lost", 0) == max(0, ran - each.after[step])


def test_texts_of_users_and_models_stay_text(browser, tiny_model, tmp_path):
    page, _ = page_of(tiny_model(8), ["full", "verified, bounded"], Letters(), EVIL)
    page.write(tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.press("ArrowLeft")
    assert browser.run("window.broken") is None
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.images.length") == 0
    assert browser.run("document.getElementById('prompt').textContent") == EVIL
    assert "<script>window.broken" in browser.run("document.querySelector('.token').textContent")
    assert browser.errors == []


def test_every_token_names_its_exit_layer_and_lost_drafts_are_struck_through(opened):
    browser, recorders = opened
    for index, name in enumerate(NAMES):
        emitted = recorders[name].emitted
        labels = of_tokens(browser, index, "x.ariaLabel")
        assert all(f"exit layer {each.token.exit_layer}" in label for each, label in zip(emitted, labels, strict=True))
        assert of_tokens(browser, index, "+x.firstChild.textContent") == [each.token.id for each in emitted]
        choose(browser, index)
        browser.press("End")
        lost = of_tokens(browser, index, "getComputedStyle(x).textDecorationLine == 'line-through'")
        assert lost == [each.rolled_back for each in emitted]
    assert any(each.rolled_back for each in recorders["verified, bounded"].emitted)


def test_the_first_difference_from_the_full_model_is_marked(opened):
    browser, recorders = opened
    texts = {name: [token.id for token in recorders[name].settled] for name in NAMES}
    for index, name in enumerate(NAMES):
        marked = of_tokens(browser, index, "+x.dataset.at", ".differs")
        settled = [at for at, each in enumerate(recorders[name].emitted) if not each.rolled_back]
        place = first_difference(texts[name], texts["full"])
        assert marked == ([] if place is None else [settled[place]])
    assert first_difference(texts["lossy"], texts["full"]) is not None
    assert first_difference(texts["verified, bounded"], texts["full"]) is None


def test_it_opens_at_the_first_difference_else_at_the_first_early_token(opened, browser, tiny_model, tmp_path):
    browser, recorders = opened
    settled = [token.id for token in recorders["lossy"].settled]
    assert read(browser, "'.run' => x.classList.contains('chosen')").index(True) == 1
    assert read(browser, "'.token[aria-selected=true]' => +x.dataset.at") == [
        first_difference(settled, [token.id for token in recorders["full"].settled])
    ]
    page, same = page_of(tiny_model(8), ["full", "verified, bounded"])
    page.write(tmp_path / "same.html")
    browser.open(tmp_path / "same.html")
    browser.requests.remove((tmp_path / "same.html").as_uri())
    emitted = same["verified, bounded"].emitted
    early = next(at for at, each in enumerate(emitted) if not each.rolled_back and each.token.exit_layer < 5)
    assert passed(browser).startswith(f"Pass {emitted[early].made + 1} ")


@pytest.mark.parametrize("width, dark", [(400, False), (500, True), (1600, True)])
def test_it_fits_the_screen_and_follows_the_colours_that_a_reader_prefers(opened, written, width, dark):
    browser, _ = opened
    browser.open(written[0], width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    wider = read(browser, "'.scroll, .flight' => x.scrollWidth > x.clientWidth")
    hints = read(browser, "'#token .hint, #wider' => x.textContent.includes('scroll')")
    assert wider == hints and (wider[0] is False or width < 500)  # what does not fit is said to be there
    paper = "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)"
    assert (sum(browser.run(paper)) < 300) == dark
    browser.run("document.getElementById('theme').click()")
    assert (sum(browser.run(paper)) > 300) == dark


def test_everything_that_can_be_used_has_a_name(opened):
    browser, _ = opened
    unnamed = browser.run("""[...document.querySelectorAll("button, input, select, [tabindex], [role=img]")]
        .filter(x => !(x.ariaLabel || x.textContent.trim() || x.getAttribute("aria-labelledby"))).map(x => x.outerHTML)""")
    assert unnamed == []
