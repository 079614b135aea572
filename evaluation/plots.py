"""Pictures of what was measured, from the rows of the table that they belong to. matplotlib is needed for
this alone.

Colours come from viridis and cividis, which colour-blind readers can tell apart, and never stand alone:
shapes, fillings or numbers say the same.
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from common.errors import UserError
from evaluation.analysis import divergences, look
from evaluation.figures import pareto
from evaluation.layer_plots import draw_confidence, draw_divergences, draw_ranks, draw_reliability
from training.runs import read_log

ASKED = ("softmax", "weighted", "jsd")  # confidence functions whose judgement is drawn
SHAPES = {
    "full": "*",
    "static": "D",
    "softmax": "o",
    "weighted": "s",
    "jsd": "^",
    "hidden": "v",
    "classifier": "P",
    "entropy": "X",
}
SHADES = {
    "full": 0.0,
    "softmax": 0.1,
    "weighted": 0.5,
    "jsd": 0.75,
    "hidden": 0.3,
    "classifier": 0.6,
    "entropy": 0.85,
}
FILLINGS = {
    "none": "none",
    "fixed": "left",
    "decaying": "bottom",
    "adaptive": "right",
}  # of a shape, by pruning schedule


def pyplot():
    """matplotlib.pyplot, drawing into files. Raises UserError if it is not there."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.dpi": 120,
    })  # fmt: skip
    return plt


def depth_color(plt, layer: int, n_layers: int):
    """The colour of a layer, from the lowest (dark) to the last (bright)."""
    return plt.get_cmap("viridis")(0.9 * layer / n_layers)


# ---------------------------------------------------------------- training


def draw_training(log: Path) -> Path:
    """Training loss, and for each validation file loss and agreement of every exit, against steps, from a
    log.jsonl of train.py; into a PNG beside it, which is returned. Raises UserError for a file that is not
    such a log."""
    training, curves = read_curves(log)
    plt = pyplot()
    count = max(1, len(curves))
    figure, axes = plt.subplots(2, count, figsize=(5 * count, 7), squeeze=False, sharex=True)
    for column, (file, layers) in enumerate(curves.items() or [("", {})]):
        loss, agreement = axes[:, column]
        loss.plot(
            *zip(*smoothed(training)), color="0.75", linewidth=1, label="training, deepest layer of the step"
        )
        for layer, points in sorted(layers.items()):
            steps, losses, same = zip(*points)
            style = {
                "color": depth_color(plt, layer, max(layers)),
                "marker": f"${layer}$",
                "label": f"layer {layer}",
            }
            loss.plot(steps, losses, **style)
            agreement.plot(steps, same, **style)
        loss.set(
            title=Path(file).parent.name or file, ylabel="loss (nats a target)", ylim=zoom(training, layers)
        )
        agreement.set(xlabel="step", ylabel="agreement with the last layer", ylim=(None, 1.01))
        loss.legend(fontsize="small")
    out = Path(log).with_suffix(".png")
    figure.savefig(out)
    plt.close(figure)
    return out


def read_curves(log: Path) -> tuple[list[tuple], dict]:
    """(step, loss) of the training, and by validation file and layer (step, loss, agreement). Raises
    UserError."""
    curves = defaultdict(lambda: defaultdict(list))
    try:
        rows = read_log(Path(log))
        training = [(row["step"], finite(row["loss"])) for row in rows if "loss" in row]
        for row in rows:
            for layer, (loss, same) in row.get("layers", {}).items():
                curves[row["dev"]][int(layer)].append((row["step"], finite(loss), finite(same)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{log}: not a log of train.py ({error})") from None
    if not training:
        raise UserError(f"{log}: not a log of train.py, or one without a step yet")
    return training, curves


def finite(value: float) -> float:
    """The value. Raises ValueError for one that no curve can show."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is not finite")
    return value


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most 200 points, each the mean of its stretch."""
    size = -(-len(points) // 200)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def zoom(training: list[tuple[int, float]], layers: dict) -> tuple[float, float]:
    """Limits of the loss that leave out the first steps' fall."""
    seen = [loss for _, loss in training[len(training) // 10 :]]
    for points in layers.values():
        seen += [loss for _, loss, _ in points]
    return min(seen) - 0.1, max(seen) + 0.1


# ---------------------------------------------------------------- evaluation


def draw_evaluation(folder: Path, rows: list[dict], model, tokenizer) -> list[Path]:
    """Pictures of the rows of eval.py, and of what the layers of the model see in the texts that it wrote;
    returns the files. Rows of a sweep, which keep no texts, give fewer."""
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    starts = [at for at, row in enumerate(rows) if row["name"] == "full"]  # of a table
    for first, end in zip(starts, [*starts[1:], len(rows)]):
        own = rows[first:end]
        name = own[0]["task"]
        if f"{name}-speed" in made:
            name += f"-{first}"  # another table of this task
        made[f"{name}-speed"] = draw_speed(plt, own)
        made[f"{name}-confidence-flops"] = draw_flops(plt, own)
        if "prompts" not in own[0]:
            made[f"{name}-sweep"] = draw_sweep(plt, own)
        else:
            for kind, figure in pictures_of_layers(plt, own, model, tokenizer).items():
                made[f"{name}-{kind}"] = figure
    paths = []
    for name, figure in made.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
            plt.close(figure)
    return paths


def pictures_of_layers(plt, rows: list[dict], model, tokenizer) -> dict:
    """Pictures of what the layers see in the texts of the full model's row, and of one text under every
    row."""
    title = titled(rows)
    texts = [(each["prompt_tokens"], each["tokens"]) for each in rows[0]["prompts"]]
    views = look(model, texts, ASKED)
    prompt, output = max(texts[:20], key=lambda text: min(len(text[1]), 25))
    words = [piece(tokenizer, token) for token in output[:30]]
    styles = {name: style_of(plt, name) for name in ASKED}
    return {
        "ranks": draw_ranks(plt, views, title),
        "confidence": draw_confidence(plt, views, styles, title),
        "reliability": draw_reliability(plt, views, styles, title),
        "jsd": draw_divergences(plt, divergences(model, prompt, output)[:, :30], words, title),
        "exits": draw_exits(plt, rows, texts.index((prompt, output)), tokenizer, model.config.n_layers),
    }


def titled(rows: list[dict]) -> str:
    """The task of some rows and on how many inputs they were measured."""
    return f"{rows[0]['task']}, {rows[0]['inputs']} inputs"


def piece(tokenizer, token: int) -> str:
    return tokenizer.piece(token).strip() or "·"


def kind(row: dict) -> str:
    """What gives a row its colour and shape: its confidence function, or static, or full."""
    config = row["config"]
    if config["confidence"] is None:
        return "full"
    return "static" if config["threshold"] == 0 and not config["verify"] else config["confidence"]


def style_of(plt, name: str) -> dict:
    """Colour and shape of a kind of row."""
    color = "0.5" if name == "static" else plt.get_cmap("viridis")(SHADES.get(name, 0.95))
    return {"color": "k" if name == "full" else color, "marker": SHAPES.get(name, "h")}


def error_bars(value: float, interval: list[float]) -> np.ndarray:
    """How far the interval reaches to both sides: (2, 1)."""
    low, high = interval
    return np.array([[max(0, value - low)], [max(0, high - value)]])


def draw_speed(plt, rows: list[dict]):
    """Quality kept against speed, with 95 % intervals over the prompts; the Pareto front as a line."""
    figure, axis = plt.subplots(figsize=(8, 5))
    for row in rows:
        config, style = row["config"], style_of(plt, kind(row))
        filled = "full" if config["verify"] or kind(row) == "full" else FILLINGS[config["prune"]]
        if config["fill"] == "copy":
            style["marker"] = "x"
        elif config["draft"] == "auto":
            style["marker"] = "P"
        axis.errorbar(
            row["speedup"],
            100 * row["kept"],
            xerr=error_bars(row["speedup"], row["speedup_ci"]),
            yerr=100 * error_bars(row["kept"], row["kept_ci"]),
            label=row["name"],
            linestyle="",
            linewidth=0.8,
            markersize=12 if kind(row) == "full" else 8,
            fillstyle=filled,
            markerfacecoloralt="w",
            **style,
        )
    points = {row["name"]: (row["speedup"], 100 * row["kept"]) for row in rows}
    front = sorted(points[name] for name in pareto(points))
    axis.plot(*zip(*front), color="0.7", linewidth=1, zorder=0, label="Pareto front")
    axis.set(
        xlabel="speed-up over the full model",
        ylabel="% of the full model's scores kept (the least of them)",
        title=f"{titled(rows)}: speed and quality, 95 % intervals over inputs",
    )
    axis.legend(
        fontsize="small",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        title="half filled: pruned\nfilled: verified",
    )
    return figure


def draw_sweep(plt, rows: list[dict]):
    """Quality kept and exit layer against the swept number with the most values, a line for each combination
    of the others; None if nothing swept can be an axis."""
    configs = [row["config"] for row in rows[1:]]
    swept = [name for name in configs[0] if len({str(config[name]) for config in configs}) > 1]
    sizes = {}
    for name in swept:
        values = {str(config[name]): config[name] for config in configs}.values()
        if all(type(value) in (int, float) for value in values):
            sizes[name] = len(values)
    if not sizes or max(sizes.values()) < 3:
        return None
    field, lines = max(sizes, key=sizes.get), defaultdict(list)
    for row, config in zip(rows[1:], configs):
        lines[" ".join(str(config[name]) for name in swept if name != field)].append(row)
    figure, (quality, depth) = plt.subplots(1, 2, figsize=(10, 4))
    quality.axhline(100, color="k", linewidth=1, linestyle=":", label="full")
    depth.axhline(rows[0]["avg_exit_layer"], color="k", linewidth=1, linestyle=":", label="full")
    for number, (name, members) in enumerate(lines.items()):
        members.sort(key=lambda row: row["config"][field])
        style = {
            "color": plt.get_cmap("viridis")(0.85 * number / len(lines)),
            "marker": "oDs^vPXh"[number % 8],
        }
        values = [row["config"][field] for row in members]
        bars = np.hstack([error_bars(row["kept"], row["kept_ci"]) for row in members])
        quality.errorbar(
            values, [100 * row["kept"] for row in members], yerr=100 * bars, label=name, capsize=2, **style
        )
        depth.plot(values, [row["avg_exit_layer"] for row in members], label=name, **style)
    quality.set(xlabel=field, ylabel="% of the full model's scores kept", title=titled(rows))
    depth.set(xlabel=field, ylabel="average exit layer", title=titled(rows))
    quality.legend(fontsize="small")
    return figure


def draw_flops(plt, rows: list[dict]):
    """Confidence FLOPs a token of each function by pruning schedule, as points: a logarithmic axis has no
    zero for bars."""
    table = {}
    for row in rows:
        config = row["config"]
        if row["confidence_flops_per_token"] and not config["verify"] and config["fill"] == "parallel":
            table.setdefault((kind(row), config["prune"]), row["confidence_flops_per_token"])
    functions = [name for name in ASKED if any(function == name for function, _ in table)]
    if not functions:
        return None
    figure, axis = plt.subplots(figsize=(6, 4))
    for number, (schedule, filling) in enumerate(FILLINGS.items()):
        points = [
            (i + 0.12 * (number - 1.5), table[name, schedule])
            for i, name in enumerate(functions)
            if (name, schedule) in table
        ]
        if points:
            axis.plot(
                *zip(*points),
                linestyle="",
                marker="o",
                markersize=10,
                fillstyle=filling,
                markerfacecoloralt="w",
                color=plt.get_cmap("viridis")(0.28 * number),
                label=schedule,
            )
    axis.set(
        yscale="log",
        ylabel="confidence FLOPs a token (logarithmic)",
        title=f"{titled(rows)}: what asking costs",
    )
    axis.set_xlim(-0.5, len(functions) - 0.5)
    axis.set_xticks(range(len(functions)), functions)
    axis.legend(fontsize="small", title="pruning", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_exits(plt, rows: list[dict], number: int, tokenizer, n_layers: int):
    """Exit layer of every token of one text, a line for each setting, the full model's first."""
    rows = [rows[0], *(row for row in rows[1:] if kind(row) != "static")][:12]
    length = min(30, max(len(row["prompts"][number]["tokens"]) for row in rows))
    figure, axis = plt.subplots(figsize=(max(7, 0.68 * length), 0.55 * len(rows) + 1.4))
    grid = np.full((len(rows), length), np.nan)
    for i, row in enumerate(rows):
        each = row["prompts"][number]
        for at, (token, layer) in enumerate(zip(each["tokens"][:length], each["exit_layers"])):
            grid[i, at] = layer
            color = "w" if layer < 0.6 * n_layers else "k"
            axis.text(
                at,
                i,
                f"{piece(tokenizer, token)}\n{layer}",
                ha="center",
                va="center",
                fontsize="x-small",
                color=color,
            )
    image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=1, vmax=n_layers)
    axis.set(title=f"{rows[0]['task']}: exit layer of every token of one text")
    axis.grid(False)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_xticks([])
    seen = np.unique(grid[~np.isnan(grid)]).astype(int).tolist()
    figure.colorbar(image, label="exit layer", ticks=sorted({1, *seen, n_layers}))
    return figure
