"""A threshold with a guarantee: Learn then Test (Angelopoulos 2021), as CALM uses it (Schuster 2022, section 4).

With probability of at least 1 - error over the draw of the calibration prompts, the expected loss at the chosen threshold is at most the
tolerance, on prompts from the same source.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from common.errors import UserError
from common.processes import tell
from decoding.settings import DecodeConfig
from evaluation.measure import encode_inputs, measure
from evaluation.metrics import rouge_l_f1
from evaluation.tasks import Task
from formats.data import Example

CANDIDATES = tuple(step / 20 for step in range(20, -1, -1))  # thresholds, from cautious to bold


@dataclass(frozen=True)
class Tested:
    """One threshold, its mean loss on the calibration prompts, and how likely so small a mean is if the true one is above the tolerance."""

    threshold: float
    risk: float
    p_value: float


def calibrate(losses: Callable[[float], list[float]], tolerance: float, error: float,
              candidates: tuple[float, ...] = CANDIDATES) -> tuple[float | None, list[Tested]]:  # fmt: skip
    """The last of the candidates, walked in their order until one fails, whose risk is significantly below the tolerance (fixed-sequence
    testing: a failure ends the walk, so that no correction for many tests is due); None if the first fails. And all that were tested.
    losses(threshold): the loss in [0, 1] on every calibration prompt."""
    chosen, tested = None, []
    for threshold in candidates:
        values = losses(threshold)
        tested.append(Tested(threshold, sum(values) / len(values), p_value(values, tolerance)))
        if tested[-1].p_value > error:
            break
        chosen = threshold
    return chosen, tested


def p_value(losses: list[float], tolerance: float) -> float:
    """Hoeffding-Bentkus: for independent losses in [0, 1] whose expectation exceeds the tolerance, the probability of a mean as small as
    theirs is at most min(exp(-n h(min(r, t), t)), e P(Binomial(n, t) <= ceil(n r))), h(a, b) = a log(a/b) + (1-a) log((1-a)/(1-b))
    (Bates 2021, section 3.1). Raises ValueError for no losses, losses outside [0, 1] and a tolerance outside (0, 1)."""
    n = len(losses)
    if not n or not 0 < tolerance < 1 or not all(0 <= loss <= 1 for loss in losses):
        raise UserError(f"{n} losses from {min(losses, default=0)} to {max(losses, default=0)}, tolerance {tolerance}: losses, at least "
                         "one, must lie in 0 to 1, and the tolerance between")  # fmt: skip
    risk = sum(losses) / n
    a = min(risk, tolerance)
    hoeffding = math.exp(-n * (xlogx(a, tolerance) + xlogx(1 - a, 1 - tolerance)))
    bentkus = math.e * binomial_cdf(math.ceil(n * risk - 1e-9), n, tolerance)
    return min(1.0, hoeffding, bentkus)


def xlogx(a: float, b: float) -> float:
    """a log(a / b), 0 for a = 0."""
    return a * math.log(a / b) if a else 0.0


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= k)."""
    terms = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
             for i in range(min(k, n) + 1))  # fmt: skip
    return min(1.0, sum(map(math.exp, terms)))


# ---------------------------------------------------------------- on a model


def find_threshold(model, tokenizer, task: Task, sets: dict[str, list[Example]], config: DecodeConfig, risk: str, tolerance: float,
                   error: float) -> tuple[float | None, dict]:  # fmt: skip
    """The threshold that Learn then Test finds on the calibration examples, None if none passes; and how, held-out risk included. sets:
    examples by what they are, the first to calibrate on, the second to check on. risk: consistency, 1 - ROUGE-L to the full model's text;
    or task, how much lower the task's first score is."""
    full: dict[str, list[str]] = {}
    name = next(iter(task.scores)) if risk == "task" else "consistency"
    both = {"full": config.full(), "early": config}
    ready = {which: encode_inputs(model, tokenizer, task, examples, both) for which, examples in sets.items()}

    def losses(threshold: float, which: str) -> list[float]:
        """The loss of every example; the full model decodes a set once."""
        prompts, configs = ready[which]
        configs = configs | {"early": replace(configs["early"], threshold=threshold)}
        if which in full:
            del configs["full"]
        rows = measure(model, prompts, configs, 1, f"{task.name}, {which}, threshold {threshold:g}")
        texts = {label: [tokenizer.decode(out.tokens).strip() for out in row.outputs] for label, row in rows.items()}
        early, exact = texts["early"], full.setdefault(which, texts.get("full"))
        if risk == "consistency":
            return [1 - rouge_l_f1(*pair) for pair in zip(early, exact)]
        scores = [[task.score([text], [list(each.references)])[name] for text, each in zip(some, sets[which])] for some in (early, exact)]
        return [max(0.0, whole - part) for part, whole in zip(*scores)]

    fit, check = sets
    threshold, tested = calibrate(lambda threshold: losses(threshold, fit), tolerance, error)
    for each in tested:
        tell(f"threshold {each.threshold:g}: risk {each.risk:.4f}, p {each.p_value:.4f}")
    provenance = {"tolerance": tolerance, "error": error, "risk": risk, "loss": name, "calibrated on": f"{len(sets[fit])} inputs of {fit}",
                  "tested": [asdict(each) for each in tested]}  # fmt: skip
    if threshold is not None:
        held_out = losses(threshold, check)
        provenance["held out"] = {"on": f"{len(held_out)} inputs of {check}", "risk": sum(held_out) / len(held_out)}
    return threshold, provenance


def report(task: Task, threshold: float | None, provenance: dict) -> str:
    """What calibration found, in words."""
    risk, tolerance = f"{provenance['risk']} risk", provenance["tolerance"]
    if threshold is None:
        return (f"{task.name}: no threshold keeps the {risk} below {tolerance} at error level {provenance['error']}; raise --tolerance, "
                "take more inputs (--limit), other exits, or --verify, which changes nothing")  # fmt: skip
    held_out = provenance["held out"]
    above = " Above it: the guarantee is for the mean over many inputs, of the same source as those calibrated on."
    return (f"{task.name}: threshold {threshold:g}; on {held_out['on']}, not used to find it, its {risk} is {held_out['risk']:.4f} "
            f"(tolerance {tolerance})." + above * (held_out["risk"] > tolerance))  # fmt: skip
