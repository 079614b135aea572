"""What the configuration of a model must satisfy, whoever wrote it: each mistake is one line."""

from common.config import check_kinds, check_range
from common.errors import UserError
from formats.adapters import read_adapter

ACTIVATIONS = ("silu", "gelu_tanh")
LIMITS = {
    "n_layers": 10_000,
    "max_len": 2**20,
}  # every layer is an object, every position a row of the rotary table
SIZES = (
    "vocab_size",
    "n_layers",
    "d_model",
    "n_heads",
    "n_kv_heads",
    "d_ff",
    "max_len",
    "head_dim",
    "window",
)
FACTORS = (
    "norm_eps",
    "query_scale",
    "embedding_scale",
    "rope_base",
    "local_rope_base",
    "rope_factor",
    "attention_cap",
    "logit_cap",
)


def one_or_several(ids) -> tuple[int, ...] | int | None:
    """The ids that end a text in the form of the config: None, one, or a tuple of several."""
    if not isinstance(ids, (tuple, list)):
        return ids
    if len(ids) > 1:
        return tuple(ids)
    return ids[0] if ids else None


def check_layers(name: str, layers, n_layers: int) -> None:
    """Raises UserError unless every exit layer lies in 1..L-1 (layer L is not an exit: it is the full
    model)."""
    bad = [layer for layer in layers if not 1 <= layer < n_layers]
    if bad:
        raise UserError(
            f"{name}: layer {bad[0]} is not an exit of a model of {n_layers} layers; choose from 1 to "
            f"{n_layers - 1}"
        )


def check_shape(config) -> None:
    """Raises UserError for a ModelConfig that no model can have."""
    check_kinds(config)
    check_numbers(config)
    check_heads(config)
    if config.activation not in ACTIVATIONS:
        raise UserError(f"unknown activation {config.activation!r}; choose from {', '.join(ACTIVATIONS)}")
    if read_adapter(config.adapter)[0] and not config.exit_norms:
        raise UserError(
            f"adapter is {config.adapter}, but it stands before norms in exit_norms, and there are none"
        )
    for name in ("exit_norms", "classifiers", "exit_layers"):
        check_layers(name, getattr(config, name), config.n_layers)
    for name in ("global_layers", "unrotated_layers"):
        for layer in getattr(config, name):
            if not 1 <= layer <= config.n_layers:
                raise UserError(f"{name}: there is no layer {layer}; choose from 1 to {config.n_layers}")
    for token in config.ends:
        if not 0 <= token < config.vocab_size:
            raise UserError(f"eos_id is {token}; it must lie in 0 to {config.vocab_size - 1}")


def check_numbers(config) -> None:
    """Raises UserError for a size below 1 or beyond its limit, and for a factor that is not above 0."""
    for name in SIZES:
        if getattr(config, name) is not None:
            check_range(name, getattr(config, name), least=1, most=LIMITS.get(name, 2**31))
    for name in FACTORS:
        if getattr(config, name) is not None:
            check_range(name, getattr(config, name), above=0)


def check_heads(config) -> None:
    """Raises UserError for heads that do not divide what they must, and for rotary bands out of order."""
    if config.head_dim is None and config.d_model % config.n_heads:
        raise UserError(
            f"d_model {config.d_model} must be a multiple of n_heads {config.n_heads}, or head_dim given"
        )
    head_dim = config.head_dim or config.d_model // config.n_heads
    if head_dim % 2:
        raise UserError(f"head_dim is {head_dim} (d_model / n_heads if not given); it must be even")
    if config.n_heads % config.n_kv_heads:
        raise UserError(f"n_kv_heads {config.n_kv_heads} must divide n_heads {config.n_heads}")
    bands = config.rope_bands
    if bands and (len(bands) != 3 or not 0 < bands[0] < bands[1]):
        raise UserError(f"rope_bands is {bands}; it must be low, high and length, low below high, or nothing")
