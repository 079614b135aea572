"""Times of actions that are to be compared: they take turns, so that a drift of the machine meets all
alike."""

import common.threads  # noqa: F401  before torch

import time
from collections.abc import Callable, Hashable
from statistics import median

import torch


def seconds(actions: dict[Hashable, Callable[[], object]], device: str, repeat: int) -> dict[Hashable, float]:
    """Median time of each action over `repeat` turns, after one that warms up."""
    times = {name: [] for name in actions}
    for turn in range(repeat + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn > 0:
                times[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in times.items()}
