"""The share of a device's peak that a training uses: model FLOPs utilization (PaLM, Chowdhery 2022, appendix
B).

Counted is what the model needs, multiply-adds twice: 2 operations a weight and position forward, 4 backward,
and 12 H C T for the attention of a position among T, in every layer that ran; a head for every target and
exit that was asked. Not counted is what an implementation adds, blocks made anew with --recompute and heads
without a gradient, and what is small: norms, rotation, softmax.
"""

from collections.abc import Collection
from fnmatch import fnmatchcase

import torch

from decoding.flops import block_weights
from formats.adapters import adapter_weights, read_adapter, side_shape
from model import ModelConfig
from training.settings import TrainConfig

# TFLOP/s of a card, by what torch calls it, without sparsity: bfloat16, TF32 and float32 (None: the card has
# no such units). Sources: NVIDIA's data sheets (A10, A100, H100, H200, L4, L40S, T4, V100) and the white
# papers of GA102 and Ada (RTX 3090 and 4090, bfloat16 summed in float32).
PEAKS = {
    "NVIDIA A10": (125, 62.5, 31.2),
    "NVIDIA A100-*GB": (312, 156, 19.5),
    "NVIDIA A100 *PCIe": (312, 156, 19.5),
    "NVIDIA H100 80GB HBM3": (989, 494, 67),
    "NVIDIA H100 PCIe": (756, 378, 51),
    "NVIDIA H200": (989, 494, 67),
    "NVIDIA L4": (121, 60, 30.3),
    "NVIDIA L40S": (362, 183, 91.6),
    "NVIDIA GeForce RTX 3090": (71, 35.6, 35.6),
    "NVIDIA GeForce RTX 4090": (165, 82.6, 82.6),
    "Tesla T4": (None, None, 8.1),
    "Tesla V100-PCIE-*": (None, None, 14),
    "Tesla V100-SXM2-*": (None, None, 15.7),
}


def peak_flops(config: TrainConfig) -> float | None:
    """Operations a second that one device could do at most: as --peak-tflops says, or a known card; else
    None."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if torch.device(config.device).type != "cuda":
        return None
    tflops = card_tflops(torch.cuda.get_device_name(), config.dtype, config.tf32)
    return None if tflops is None else tflops * 1e12


def card_tflops(name: str, dtype: str, tf32: bool) -> float | None:
    """TFLOP/s of the card with this name in the dtype of training; None for one that is not known, or
    cannot."""
    for pattern, (bfloat16, by_tf32, float32) in PEAKS.items():
        if fnmatchcase(name, pattern):
            if dtype == "bfloat16":
                return bfloat16
            return by_tf32 if tf32 and by_tf32 else float32
    return None


def batch_flops(
    config: ModelConfig,
    rows: int,
    length: int,
    layers: int,
    targets: int,
    heads: Collection[int],
    frozen: bool,
    ids: int | None = None,
) -> int:
    """Operations of a micro-batch of rows of `length` positions, forward and backward, that ran `layers`
    blocks, and asked the heads of these layers, over so many `ids` (None: all), for its targets. `frozen`:
    --train heads, in which blocks only go forward, and the unembedding gets no gradient."""
    blocks = rows * length * layers * position_flops(config, length)
    unembed = targets * len(heads) * 2 * config.d_model * (ids or config.vocab_size)
    adapted = len(set(heads) & set(config.exit_norms))
    adapters = targets * adapted * 2 * adapter_weights(config)
    if adapted and read_adapter(config.adapter)[0] == "block":
        adapters = rows * length * adapted * position_flops(side_shape(config), length)
    if frozen:
        return blocks + 2 * unembed + 3 * adapters
    return 3 * (blocks + unembed + adapters)


def position_flops(config: ModelConfig, length: int) -> int:
    """Operations of one block, forward, for one of `length` positions."""
    return 2 * block_weights(config) + 4 * config.n_heads * config.head_dim * length


def speeds(positions: int, flops: int, seconds: float, peak: float | None) -> dict[str, float]:
    """What log and progress bar tell of a step: positions a second of all processes; where the peak is known,
    the share of it that the `flops` of this process are."""
    told = {"positions_per_s": round(positions / seconds)}
    if peak is not None:
        told["share_of_peak"] = round(flops / seconds / peak, 3)
    return told
