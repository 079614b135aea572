"""On a real GPU, where there is one: training, decoding and what moves there give what the CPU gives. (Tests with
`pretend_device` show on any machine that nothing mixes devices.)"""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from decode import generate
from decoding.settings import DecodeConfig
from tests.reference import PROMPT, first_gap
from tests.test_devices import CONFIG, MODES, SETTINGS, trained

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]
DEVICE = "cuda"
GREEDY = [name for name, settings in MODES.items() if "temperature" not in settings]


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_training_takes_the_same_steps(name):
    """Two steps in float32. Adam turns the noise of a gradient near zero into a step of up to the learning rate,
    0.01, so that few weights may differ by more than rounding."""
    config = replace(CONFIG, **SETTINGS[name], dtype="float32")
    expected, losses = trained(config)
    found, same = trained(replace(config, device=DEVICE))
    assert same == pytest.approx(losses, rel=1e-3)
    apart = torch.cat([(found[weight] - expected[weight]).abs().flatten() for weight in expected])
    assert (apart > 1e-3).float().mean() < 0.01


def test_training_in_bfloat16_is_near():
    _, losses = trained(replace(CONFIG, dtype="float32"))
    _, near = trained(replace(CONFIG, device=DEVICE, dtype="bfloat16"))
    assert near == pytest.approx(losses, rel=0.05)


@pytest.mark.parametrize("mode", GREEDY)
def test_decoding_gives_the_same_tokens_at_the_same_exits(model_with_ids, mode):
    here, there = (generate(model_with_ids(2).to(device), PROMPT, DecodeConfig(**MODES[mode])) for device in ("cpu", DEVICE))
    assert there.tokens == here.tokens and there.exit_layers == here.exit_layers and there.counters == here.counters
    for ours, theirs in zip(there.confidences, here.confidences):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_the_cpus_and_verified_mode_gives_its_text(tiny_model, reloaded, dtype):
    exact, loaded = tiny_model(3), reloaded(tiny_model(3), device=DEVICE, dtype=dtype)
    tokens = torch.arange(40)[None]
    near = {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    assert_close(loaded(tokens.to(DEVICE)).cpu(), exact(tokens), rtol=near, atol=near)
    full = generate(loaded, PROMPT, DecodeConfig(max_new_tokens=30)).tokens
    verified = DecodeConfig(max_new_tokens=30, confidence="softmax", threshold=0.15, verify=True)
    assert first_gap(loaded, PROMPT, generate(loaded, PROMPT, verified).tokens, full) < near


def test_sampling_and_drafting_by_measurement_run_and_repeat(tiny_model):
    model = tiny_model(1).to(DEVICE)
    for settings in ({"temperature": 1.0, "seed": 3}, {"draft": "auto"}):
        config = DecodeConfig(max_new_tokens=20, confidence="softmax", threshold=0.15, verify=True, **settings)
        assert generate(model, PROMPT, config).tokens == generate(model, PROMPT, config).tokens
