"""The share of a device's peak that a training uses, by numbers worked by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from model import ModelConfig, Transformer
from training.batches import Batch
from training.device import on_device
from training.objective import Objective
from training.optimizer import make_optimizer
from training.settings import TrainConfig
from training.utilization import batch_flops, card_tflops, peak_flops, speeds

SHAPE = ModelConfig(
    vocab_size=50, n_layers=3, d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16, max_len=16, exit_norms=(1,),
    adapter="lowrank:3",
)  # fmt: skip
# A block's matrices: qkv 16 x 8, out 8 x 8, gate and up 32 x 8, down 8 x 16.
WEIGHTS = 128 + 64 + 256 + 128


def test_operations_of_a_batch_by_hand():
    blocks = 6 * WEIGHTS * 20 * 2 + 12 * 2 * 4 * 10 * 20 * 2  # 20 positions, 2 layers; 2 heads of 4, 10 positions seen
    head, adapter = 6 * 8 * 50, 6 * 2 * 3 * 8
    assert batch_flops(SHAPE, 2, 10, layers=2, targets=7, heads=(2, 3), frozen=False) == blocks + 7 * 2 * head
    assert batch_flops(SHAPE, 2, 10, 2, 7, {1, 3}, False) == blocks + 7 * (2 * head + adapter)
    # heads alone: blocks go forward, a third of the work; of a head's three products one is not made
    assert batch_flops(SHAPE, 2, 10, 2, 7, {1}, True) == blocks // 3 + 7 * (head * 2 // 3 + adapter)


def test_a_model_is_counted_by_the_weights_that_it_has():
    of_a_block = sum(weight.numel() for weight in Transformer(SHAPE).blocks[0].parameters() if weight.dim() > 1)
    assert of_a_block == WEIGHTS
    assert batch_flops(SHAPE, 1, 1, 1, 0, (), False) == 6 * WEIGHTS + 12 * 2 * 4


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_counts_the_layers_and_exits_that_it_uses(recompute, monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 50, (2, 11))
    targets = np.where(np.arange(10) >= 6, tokens[:, 1:], -1)  # 8 learn
    batch = Batch(tokens[:, :-1], targets, np.ones((2, 10), np.int64))
    config = TrainConfig(loss="rotate", exits=(1, 2), per_step=1, accumulate=2, device="cpu", recompute=recompute)
    model = Transformer(SHAPE)
    objective, optimizer = Objective(model, config), make_optimizer(model, config)
    monkeypatch.setattr(train, "skipped_layers", lambda config, n_layers, number: {0: {2, 3}, 1: set()}[number])
    train.train_step(objective, optimizer, on_device(itertools.repeat(batch), config), config, 0)
    heads = {1, 3}  # of the first step
    expected = batch_flops(SHAPE, 2, 10, 1, 8, heads, False) + batch_flops(SHAPE, 2, 10, 3, 8, heads, False)
    assert objective.flops == expected


def test_speed_and_share_by_hand():
    assert speeds(4096, 10**12, 0.5, None) == {"positions_per_s": 8192}
    assert speeds(4096, 10**12, 0.5, 8e12) == {"positions_per_s": 8192, "share_of_peak": 0.25}


@pytest.mark.parametrize("name, dtype, tf32, peak", [
    ("NVIDIA H100 80GB HBM3", "bfloat16", True, 989), ("NVIDIA H100 PCIe", "bfloat16", True, 756),
    ("NVIDIA A100-SXM4-40GB", "bfloat16", False, 312), ("NVIDIA A100 80GB PCIe", "float32", True, 156),
    ("NVIDIA A100-SXM4-80GB", "float32", False, 19.5), ("NVIDIA L4", "bfloat16", True, 121),
    ("NVIDIA L40S", "bfloat16", True, 362), ("Tesla T4", "float32", True, 8.1), ("Tesla T4", "bfloat16", True, None),
    ("Tesla V100-SXM2-16GB", "float32", False, 15.7), ("NVIDIA GeForce RTX 4090", "bfloat16", True, 165),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", True, None),
    ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bfloat16", True, None), ("Another Card", "bfloat16", True, None),
])  # fmt: skip
def test_peaks_are_of_the_card_and_of_the_dtype_of_training(name, dtype, tf32, peak):
    assert card_tflops(name, dtype, tf32) == peak


def test_a_peak_is_the_users_the_cards_or_none(monkeypatch):
    config = TrainConfig(device="cpu")
    assert peak_flops(config) is None
    assert peak_flops(replace(config, peak_tflops=2.5)) == 2.5e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    assert peak_flops(replace(config, device="cuda", dtype="bfloat16")) == 121e12
    assert peak_flops(replace(config, device="cuda", dtype="bfloat16", peak_tflops=100.0)) == 100e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Another Card")
    assert peak_flops(replace(config, device="cuda")) is None
