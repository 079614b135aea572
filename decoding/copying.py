"""The approximate alternative to owing: a skipped layer gets its keys and values at once, as a copy (`--fill
copy`)."""

from cache import KVCache
from decoding.record import Counters
from model import Transformer


def copy_up(model: Transformer, cache: KVCache, layer: int, counters: Counters) -> None:
    """CALM's state propagation (Schuster 2022, section 3.2): every layer above `layer` projects keys and
    values from the state of the newest position there, without attention or MLP."""
    for above, block in enumerate(model.blocks[layer:], layer + 1):
        rows = cache.owed(above, cache.filled[0])  # of the one position, at the depth of its exit
        cache.store(above, block.project(rows))
        counters.block_flops += 2 * block.qkv.numel() * len(rows)
