"""What a run cannot begin with: mistakes in its inputs, each in one line."""

from common.errors import UserError
from decoding.prediction import Contrast
from model import Transformer


def check_prompt(prompt: list[int], model: Transformer) -> None:
    """Raises UserError unless `prompt` is one non-empty list of token ids with room for an answer."""
    positions, size = model.config.max_len, model.config.vocab_size
    if len(prompt) == 0 or not all(isinstance(token, int) for token in prompt):
        raise UserError("the prompt must be one non-empty list of token ids (batch size 1)")
    if len(prompt) >= positions:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, this model {positions} positions; shorten the prompt"
        )
    if not 0 <= min(prompt) <= max(prompt) < size:
        raise UserError(f"a token id of the prompt lies outside 0 to {size - 1}")


def check_stops(stop_tokens: tuple[int, ...], model: Transformer) -> None:
    """Raises UserError for a token that the model does not know."""
    for token in stop_tokens:
        if token >= model.config.vocab_size:
            raise UserError(
                f"stop_tokens has {token}; this model's ids lie in 0 to {model.config.vocab_size - 1}"
            )


def check_amateur(amateur: Transformer, model: Transformer, settings: Contrast | None, length: int) -> None:
    """Raises UserError unless the amateur can read and contrast what the model writes, `length` tokens."""
    ours, theirs = model.config.vocab_size, amateur.config.vocab_size
    if settings is None:
        raise UserError("there is an amateur, but predict is own; set it to contrast")
    if settings.amateur != Contrast.amateur:
        raise UserError(
            f"contrast {settings.amateur} names an amateur within the model, but there is a second model; "
            "leave one out"
        )
    if ours != theirs:
        raise UserError(f"the amateur knows {theirs} tokens, the model {ours}; that must be equal")
    if amateur.config.max_len < length:
        raise UserError(
            f"the amateur has {amateur.config.max_len} positions, {length} are needed; shorten the prompt "
            "or the answer"
        )
