"""The page: what is remembered of a run equals the run, what the page computes afterwards equals what the
exits saw, and a browser shows it."""

import json
import sys
from functools import partial
from itertools import count

import pytest
from browser import Browser, find_chromium

import decode
from decode import Run, generate
from decoding.display import steps
from decoding.page import Page, row_times, script_json
from decoding.record import first_difference
from decoding.replay import Pass, Recorder, recorded
from decoding.settings import DecodeConfig

recorded = partial(recorded, decode.stream)
PROMPT = [1, 7, 3, 9]
EARLY = {"max_new_tokens": 24, "confidence": "softmax", "exit_layers": (1, 2, 4)}
SETTINGS = {
    "full": DecodeConfig(max_new_tokens=24),
    "lossy": DecodeConfig(**EARLY, threshold=0.1),
    "pruned": DecodeConfig(**EARLY, threshold=0.1, prune="fixed", prune_k=8, prune_min=4),
    "fixed exit": DecodeConfig(max_new_tokens=24, confidence="softmax", exit_layers=(2,), threshold=0.0),
    "bounded": DecodeConfig(**EARLY, threshold=0.1, max_owed=3),
    "copied": DecodeConfig(**EARLY, threshold=0.1, fill="copy"),
    "learned": DecodeConfig(**EARLY, threshold=0.1, threshold_schedule="adaptive"),
    "contrasted": DecodeConfig(**{**EARLY, "confidence": "jsd"}, threshold=0.05, predict="contrast"),
    "verified": DecodeConfig(**EARLY, threshold=0.1, verify=True),
    "verified, bounded": DecodeConfig(**EARLY, threshold=0.1, verify=True, max_owed=3),
    "verified, drawn": DecodeConfig(**EARLY, threshold=0.1, verify=True, temperature=1.0, top_p=0.9, seed=9),
}
each_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)


# ---------------------------------------------------------------- what is remembered


@each_setting
def test_every_pass_is_remembered_as_the_staircase_was(tiny_model, monkeypatch, config):
    """`filled` before and after each pass, by watching the run itself."""
    before, reached, runs = [], [], []

    def advance(run, tokens, exits, original=Run.advance):
        before.append(list(run.cache.filled))
        trace, layer = original(run, tokens, exits)
        reached.append(layer)
        runs.append(run)
        return trace, layer

    monkeypatch.setattr(Run, "advance", advance)
    recorder = recorded(tiny_model(8), PROMPT, config)
    assert [each.before for each in recorder.passes] == before
    assert [each.reached for each in recorder.passes] == reached
    assert [each.after for each in recorder.passes] == [*before[1:], runs[-1].cache.filled]
    assert recorder.filled == runs[-1].cache.filled


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


def test_the_clock_of_a_run_stands_still_while_a_token_is_shown(monkeypatch, tiny_model):
    """The clock here ticks once whenever it is read; a reader that takes 1,000 ticks with every token costs
    the run nothing."""
    clock, lost = count(), [0]
    monkeypatch.setattr("decoding.replay.perf_counter", lambda: next(clock) + lost[0])
    recorder = Recorder()
    tokens = decode.stream(tiny_model(8), PROMPT, SETTINGS["lossy"], recorder, recorder.trace)
    for _ in recorder.watch(tokens, len(PROMPT)):
        lost[0] += 1000
    times = [each.seconds for each in recorder.passes]
    assert times == sorted(times) and 0 < times[-1] < 1000


def test_the_time_of_a_block_leaves_out_the_question_before_it(monkeypatch, tiny_model):
    """Again a clock that ticks when it is read; a question takes 1,000 ticks."""
    clock, asked = count(), [0]
    monkeypatch.setattr("decoding.replay.perf_counter", lambda: next(clock) + asked[0])

    def slow(trace, layer):
        asked[0] += 1000
        return 0.5

    config = DecodeConfig(max_new_tokens=3, confidence=slow, exit_layers=(1, 2, 4), threshold=0.9)
    passes = recorded(tiny_model(0), PROMPT, config).passes
    assert asked[0] == 9000 and len(passes) == 3
    for each in passes:
        assert sorted(each.block_seconds) == [1, 2, 3, 4, 5]
        assert 0 < max(each.block_seconds.values()) < 1000


def test_times_of_blocks_are_told_by_their_rows():
    times = row_times([Pass([0, 0, 0, 0], 4, 2, {}, {1: 0.5, 2: 0.7}), Pass([4, 4, 0, 0], 5, 2, {}, {1: 0.1, 2: 0.9})])
    assert times == [(1, 0.1, 1), (4, 0.6, 2), (5, 0.9, 1)]


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
        best = token["best"][token["layer"] - 1]
        assert best[0] == token["id"]
        assert token["jsd"][token["layer"] - 1] < 1e-6
        asked = run["passes"][token["made"]]["asked"].get(token["layer"])
        if asked and token["asked"] and asked[0] is not None:
            assert best[1] - best[3] == pytest.approx(asked[0], abs=2e-3)


def test_questions_are_told_with_the_candidates_left_and_the_layer_contrasted_with(tiny_model):
    page, _ = page_of(tiny_model(8), ["full", "pruned", "contrasted"])
    _, pruned, contrasted = page.content()["inputs"][0]["runs"]
    assert {asked[2] for each in pruned["passes"] for asked in each["asked"].values()} == {8}
    amateurs = {int(layer): asked[3] for each in contrasted["passes"] for layer, asked in each["asked"].items()}
    assert amateurs[1] is None and amateurs[4] in (2, 3)
    assert all(amateur < int(layer) for token in contrasted["tokens"] for layer, amateur in token["amateurs"].items())


def test_the_first_difference_is_a_place():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 5, 3], [1, 2, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_json_in_a_script_ends_no_script():
    text = {"</script>": "<!--<script>"}
    assert "<" not in script_json(text) and json.loads(script_json(text)) == text


def test_a_hundred_tokens_of_twelve_layers_take_less_than_a_megabyte(tiny_model, tmp_path):
    model = tiny_model(8, n_layers=12, vocab_size=4096, max_len=128)
    config = DecodeConfig(max_new_tokens=100, confidence="softmax", threshold=0.3, verify=True, max_owed=8)
    page = Page(model, None, "tiny.pt")
    runs = {"full model": (config.full(), recorded(model, PROMPT, config.full())), "verified": (config, recorded(model, PROMPT, config))}
    page.add("prompt", PROMPT, runs)
    page.write(tmp_path / "page.html")
    assert len(runs["verified"][1].settled) == 100
    assert (tmp_path / "page.html").stat().st_size < 1_000_000


def test_filled_takes_few_characters():
    assert steps([13, 13, 13, 10, 7, 7, 13]) == "2×13 3×10 5×7"
    assert steps([13, 13, 13, 13, 7]) == "3×13 head×7"


def test_the_command_prints_the_staircase_and_writes_the_page(tiny_model, monkeypatch, tmp_path, capsys):
    model = tiny_model(8)
    monkeypatch.setattr("decoding.command.load_checkpoint", lambda *_, **__: (model, None))
    flags = ["--prompt", "1,7,3,9", "--exit-layers", "1,2,4", "--threshold", "0.1", "--max-new-tokens", "9", "--prune", "none"]
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


@pytest.fixture
def opened(browser, tiny_model, tmp_path):
    """The page of NAMES in the browser, and the recorders by name."""
    page, recorders = page_of(tiny_model(8), NAMES, title=EVIL)
    page.write(tmp_path / "page.html")
    browser.requests.clear()
    browser.errors.clear()
    browser.open(tmp_path / "page.html")
    yield browser, recorders
    assert browser.errors == []
    assert browser.requests == [(tmp_path / "page.html").as_uri()]  # and nothing from a network


def choose(browser, index):
    """Clicks on the heading of a run, then goes to its first pass."""
    browser.run(f"document.querySelectorAll('.run h3 button')[{index}].click()")
    browser.run("document.activeElement.blur()")
    browser.press("Home")


def read(browser, script):
    return browser.run(f"[...document.querySelectorAll({script.split(' => ')[0]})].map(x => {script.split(' => ')[1]})")


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_stepping_through_the_staircase_shows_the_numbers_of_the_run(opened, index):
    browser, recorders = opened
    passes = recorders[NAMES[index]].passes
    choose(browser, index)
    for number, each in enumerate(passes, 1):
        assert browser.run("document.getElementById('pass').textContent") == f"Pass {number} of {len(passes)}"
        assert read(browser, "'.filled li[data-step]' => +x.dataset.filled") == each.after[::-1]
        shown = read(browser, "'.filled li[data-step] b' => +x.textContent")
        assert shown == each.after[::-1]
        spent = read(browser, "'#meters .ours b' => +x.dataset.value")
        assert spent[:2] == [each.block_runs, each.flops] and spent[2] == pytest.approx(each.seconds, rel=1e-3)
        check_cells(browser, each, len(passes[0].before) - 2)
        story = browser.run("document.getElementById('story').textContent")
        assert "undefined" not in story and "NaN" not in story and "Infinity" not in story
        browser.press("ArrowRight")
    browser.press("ArrowLeft")
    assert browser.run("document.getElementById('pass').textContent") == f"Pass {len(passes) - 1} of {len(passes)}"


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
        labels = browser.run(f"[...document.querySelectorAll('.run')[{index}].querySelectorAll('.token')].map(x => x.ariaLabel)")
        for each, label in zip(emitted, labels, strict=True):
            assert f"exit layer {each.token.exit_layer}" in label
        texts = browser.run(
            f"[...document.querySelectorAll('.run')[{index}].querySelectorAll('.token')].map(x => +x.firstChild.textContent)"
        )
        assert texts == [each.token.id for each in emitted]
        choose(browser, index)
        browser.press("End")
        lost = browser.run(
            f"[...document.querySelectorAll('.run')[{index}].querySelectorAll('.token')]"
            ".map(x => getComputedStyle(x).textDecorationLine == 'line-through')"
        )
        assert lost == [each.rolled_back for each in emitted]
    assert any(each.rolled_back for each in recorders["verified, bounded"].emitted)


def test_the_first_difference_from_the_full_model_is_marked(opened):
    browser, recorders = opened
    texts = {name: [token.id for token in recorders[name].settled] for name in NAMES}
    for index, name in enumerate(NAMES):
        marked = browser.run(f"[...document.querySelectorAll('.run')[{index}].querySelectorAll('.differs')].map(x => +x.dataset.at)")
        settled = [at for at, each in enumerate(recorders[name].emitted) if not each.rolled_back]
        place = first_difference(texts[name], texts["full"])
        assert marked == ([] if place is None else [settled[place]])
    assert first_difference(texts["lossy"], texts["full"]) is not None
    assert first_difference(texts["verified, bounded"], texts["full"]) is None


def test_by_keyboard_a_token_shows_its_layers_and_enter_its_pass(opened):
    browser, recorders = opened
    recorder = recorders["lossy"]
    browser.run("document.querySelectorAll('.run')[1].querySelector('.token').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    third = recorder.emitted[2]
    asked = recorder.passes[third.made].asked
    rows = browser.run("[...document.querySelectorAll('#token tbody tr')].map(x => x.innerText)")
    assert len(rows) == 5
    for layer, (confidence, threshold, _, _) in asked.items():
        sign = "≥" if confidence >= threshold else "<"
        assert f"{confidence:.2f} {sign} {threshold:.2f}" in rows[5 - layer]
    best = browser.run("document.querySelectorAll('#token tbody tr').length && [...document.querySelectorAll('#token .best')].length")
    assert best == 25
    browser.press("Enter")
    assert browser.run("document.getElementById('pass').textContent").startswith(f"Pass {third.made + 1} ")


def test_the_text_grows_with_the_passes(opened):
    """What a later pass makes is pale; a draft not yet judged is outlined; the newest token is the one
    selected."""
    browser, recorders = opened
    index = NAMES.index("verified, bounded")
    emitted, passes = recorders["verified, bounded"].emitted, recorders["verified, bounded"].passes
    choose(browser, index)
    for k in range(len(passes)):
        marks = browser.run(
            f"[...document.querySelectorAll('.run')[{index}].querySelectorAll('.token')].map(x => "
            "['later', 'draft', 'lost'].filter(kind => x.classList.contains(kind)).join())"
        )
        for each, mark in zip(emitted, marks, strict=True):
            draft = "draft" if each.settled > k else "lost" if each.rolled_back else ""
            assert mark == ("later" if each.made > k else draft)
        selected = read(browser, "'.token[aria-selected=true]' => +x.dataset.at")
        made = [at for at, each in enumerate(emitted) if each.made == k]
        assert not made or selected == made
        browser.press("ArrowRight")


def test_play_goes_on_by_itself_and_pauses(opened):
    browser, _ = opened
    choose(browser, 1)
    browser.run("window.setInterval = (tick) => { window.tick = tick; return 7; }")
    browser.run("document.getElementById('play').click()")
    browser.run("tick(); tick()")
    assert browser.run("document.getElementById('pass').textContent").startswith("Pass 3 ")
    assert browser.run("document.getElementById('play').ariaLabel") == "Pause"
    browser.run("document.getElementById('play').click()")
    assert browser.run("document.getElementById('play').ariaLabel") == "Play"


def test_layer_numbers_show_on_request(opened):
    browser, _ = opened
    shown = "getComputedStyle(document.querySelector('.token sup')).display"
    assert browser.run(shown) == "none"
    browser.run("document.getElementById('numbers').click()")
    assert browser.run(shown) == "inline"


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_the_screen_and_follows_the_colours_that_a_reader_prefers(opened, tmp_path, width, dark):
    browser, _ = opened
    browser.requests.clear()
    browser.open(tmp_path / "page.html", width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    paper = sum(browser.run("getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)"))
    assert paper < 200 if dark else paper > 600
    browser.run("document.getElementById('theme').click()")
    other = sum(browser.run("getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)"))
    assert other > 600 if dark else other < 200


def test_everything_that_can_be_used_has_a_name(opened):
    browser, _ = opened
    unnamed = browser.run("""[...document.querySelectorAll("button, input, select, [tabindex], [role=img]")]
        .filter(x => !(x.ariaLabel || x.textContent.trim() || x.getAttribute("aria-labelledby"))).map(x => x.outerHTML)""")
    assert unnamed == []


def test_it_prints_whole(opened, tmp_path):
    browser, _ = opened
    browser.requests.clear()
    browser.open(tmp_path / "page.html", 720, dark=True, media="print")
    assert browser.run("getComputedStyle(document.getElementById('play')).display") == "none"
    assert browser.run("getComputedStyle(document.querySelector('.token sup')).display") == "inline"
    assert browser.run("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("document.querySelector('.flight').scrollWidth <= document.querySelector('.flight').clientWidth")


def test_several_prompts_are_chosen_from_a_list(browser, tiny_model, tmp_path):
    model = tiny_model(8)
    page, _ = page_of(model, ["full", "lossy"])
    other = recorded(model, [5, 6], SETTINGS["full"])
    page.add("another prompt", [5, 6], {"full": (SETTINGS["full"], other)}, references=["<b>right</b>"])
    page.write(tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.run("x = document.getElementById('input'); x.value = 1; x.onchange()")
    assert browser.run("document.getElementById('prompt').textContent") == "another prompt"
    assert browser.run("document.getElementById('references').innerText") == "Reference: <b>right</b>"
    assert read(browser, "'.filled li[data-step]' => +x.dataset.filled") == other.filled[::-1]
    assert browser.errors == []
