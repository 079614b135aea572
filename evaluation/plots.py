"""Plots of measurements, from the rows of --json or the log of a training run. Only this module needs
matplotlib.

Colors come from viridis and cividis, which color-blind readers can tell apart, and are never the only
difference between lines, points or bars: shapes, fillings or numbers show it, too.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import reading
from evaluation.analysis import Views, auroc, calibration_error, divergences, look, reliability
from training.runs import read_log

CHECKS = ("softmax", "weighted", "jsd")  # confidence functions that are evaluated
TIME = "ms per token, batch 1"
STYLES = {  # kind of row -> shade of viridis, shape; other kinds are user-defined functions
    "full": (0.0, "*"), "softmax": (0.1, "o"), "hidden": (0.3, "v"), "weighted": (0.5, "s"),
    "classifier": (0.6, "P"), "jsd": (0.75, "^"), "entropy": (0.85, "X"), "static": (0.9, "D"),
}  # fmt: skip


def pyplot():
    """matplotlib.pyplot, drawing into files. Raises UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.dpi": 120,
    })  # fmt: skip
    return plt


def make_folder(folder: Path) -> None:
    """Makes a folder for pictures, before anything is measured. Raises UserError without matplotlib."""
    pyplot()
    folder.mkdir(parents=True, exist_ok=True)


def viridis(shade: float):
    return pyplot().get_cmap("viridis")(shade)


# ---------------------------------------------------------------- a training run


def draw_training(log: Path) -> Path:
    """Plots a log.jsonl of train.py: the training loss by step, and the loss and agreement of every exit on
    each validation file. Writes the plot to a PNG file next to the log, and returns its path. Raises
    UserError for a file that is not such a log."""
    training, curves = read_curves(log)
    plt, count = pyplot(), max(1, len(curves))
    figure, axes = plt.subplots(2, count, figsize=(5 * count, 7), squeeze=False, sharex=True)
    for (loss, agreement), (file, layers) in zip(axes.T, curves.items() or [("", {})]):
        loss.plot(*smoothed(training).T, color="0.75", label="training, deepest layer of the step")
        seen = [value for _, value in training[len(training) // 10 :]]  # without the initial drop
        for layer, points in sorted(layers.items()):
            steps, losses, same = zip(*points)
            seen += losses
            style = {"color": viridis(0.9 * layer / max(layers)), "marker": f"${layer}$"}
            loss.plot(steps, losses, label=f"layer {layer}", **style)
            agreement.plot(steps, same, **style)
        loss.set(title=Path(file).parent.name or file, ylabel="loss (nats per target)")
        loss.set_ylim(min(seen) - 0.1, max(seen) + 0.1)
        agreement.set(xlabel="step", ylabel="agreement with the last layer", ylim=(None, 1.01))
        loss.legend(fontsize="small")
    out = log.with_suffix(".png")
    figure.savefig(out)
    plt.close(figure)
    return out


def read_curves(log: Path) -> tuple[list[tuple], dict]:
    """Returns (step, loss) of the training steps, and lists of (step, loss, agreement) by validation file and
    layer. Raises UserError."""
    curves = defaultdict(lambda: defaultdict(list))
    with reading(log, "not a log of train.py"):
        rows = read_log(log)
        training = [(row["step"], float(row["loss"])) for row in rows if "loss" in row]
        for row in rows:
            for layer, (loss, same) in row.get("layers", {}).items():
                curves[row["dev"]][int(layer)].append((row["step"], float(loss), float(same)))
    if not training:
        raise UserError(f"{log}: is not a log of train.py, or has no steps yet")
    return training, curves


def smoothed(points: list[tuple[int, float]]) -> np.ndarray:
    """At most 200 points, each with the last step and the mean loss of a stretch of steps: (points, 2)."""
    parts = np.array_split(np.array(points), min(200, len(points)))
    return np.array([(part[-1, 0], part[:, 1].mean()) for part in parts])


# ---------------------------------------------------------------- a table


def draw_evaluation(folder: Path, tables: list[list[dict]], model, tokenizer) -> list[Path]:
    """Plots the tables of eval.py, and what the layers of the model predict in the texts that it wrote.
    Returns the files. A sweep yields fewer plots, because its rows keep no texts."""
    paths = []
    for number, table in enumerate(tables, 1):
        name = table[0]["task"]
        if folder / f"{name}-frontier.png" in paths:
            name += f"-{number}"  # another table of this task
        scores = [(f"{score}, %", "scores") for score in list(table[0]["scores"])[:1]]
        scores.append(("ROUGE-L to the full model's text, %", "rougeL_full"))
        figures = {"frontier": draw_rows(table, scores), "time": draw_time(table)}
        if "prompts" in table[0]:
            figures |= draw_layers(table, model, tokenizer)
        for kind, figure in figures.items():
            paths.append(folder / f"{name}-{kind}.png")
            figure.savefig(paths[-1])
            pyplot().close(figure)
    return paths


def titled(rows: list[dict]) -> str:
    """The title of a plot: the task of its rows, and the number of inputs that they were measured on."""
    return f"{rows[0]['task']}, {rows[0]['inputs']} inputs"


def kind_of(row: dict) -> str:
    """The kind of a row, which determines its color and shape: its confidence function, static or full."""
    config = row["config"]
    if config["confidence"] is None:
        return "full"
    return "static" if config["threshold"] == 0 and not config["verify"] else config["confidence"]


def style_of(kind: str) -> dict:
    shade, marker = STYLES.get(kind, (0.95, "h"))
    return {"color": viridis(shade), "marker": marker}


Point = tuple[float, float, float]  # a figure and the ends of its interval


def milliseconds(row: dict) -> Point:
    """The milliseconds per token."""
    value, (low, high) = row["speedup"], row["speedup_ci"]
    return tuple(1000 * value / row["tokens_per_s"] / end for end in (value, high, low))


def in_percent(row: dict, name: str) -> Point:
    """A share in percent; if there are several scores, the first."""
    value, interval = row[name], row[f"{name}_ci"]
    if isinstance(value, dict):
        first = next(iter(value))
        value, interval = value[first], interval[first]
    return tuple(100 * each for each in (value, *interval))


def draw_rows(rows: list[dict], panels: list[tuple[str, str]]):
    """Plots rows as points over their time per token, with 95 % intervals over the inputs, in one panel for
    each pair of a y label and a figure. Rows that differ only in their threshold (static exits: in their
    layer) are joined by a curve. Filled points are exact."""
    figure, axes = pyplot().subplots(1, len(panels), figsize=(7 * len(panels), 5), squeeze=False)
    curves = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["tokens_per_s"]):
        config, varied = row["config"], "exit_layers" if kind_of(row) == "static" else "threshold"
        curves[str(config | {varied: None}), row["checkpoint"]].append((str(config[varied]), row))
    for axis, (ylabel, name) in zip(axes[0], panels):
        for members in curves.values():
            kind, verify = kind_of(members[0][1]), members[0][1]["config"]["verify"]
            style = style_of(kind) | {"fillstyle": "full" if verify or kind == "full" else "none"}
            place = (-6 if verify else 6, -10 if kind == "static" else 4)  # such rows are often neighbors
            side = {"ha": "right" if verify else "left", "textcoords": "offset points"}
            x, *x_ends = np.array([milliseconds(row) for _, row in members]).T  # (members,) each
            y, *y_ends = np.array([in_percent(row, name) for _, row in members]).T
            style |= {"xerr": np.abs(x - x_ends), "yerr": np.abs(y - y_ends)}  # (2, members) each
            axis.errorbar(x, y, elinewidth=0.8, linewidth=0.8, markersize=8, label=kind, **style)
            for (value, row), point in zip(members, zip(x, y)):
                text = value.strip("()[],") if len(members) > 1 else row["name"]
                axis.annotate(text, point, place, fontsize="x-small", **side)
        axis.set(title=f"{titled(rows)}, 95 % intervals; filled: exact", xlabel=TIME, ylabel=ylabel)
        kinds = dict(zip(*axis.get_legend_handles_labels()[::-1]))  # each once
        axis.legend(kinds.values(), kinds.keys(), fontsize="small")
    return figure


def draw_time(rows: list[dict]):
    """Plots the time per token in parts: blocks (at the full model's speed), confidence checks, the rest."""
    rows = [row for row in rows if row["exit_efficiency"]]
    figure, axis = pyplot().subplots(figsize=(7, 0.35 * len(rows) + 1.6))
    times = np.array([milliseconds(row)[0] for row in rows])
    blocks = np.minimum(1, [row["exit_efficiency"] for row in rows])
    checks = np.minimum(1 - blocks, [row["confidence_time_share"] or 0 for row in rows])
    parts = {"blocks and LM heads": blocks, "confidence checks": checks, "rest": 1 - blocks - checks}
    names, left = [row["name"] for row in rows], np.zeros(len(rows))
    for (label, shares), shade, hatch in zip(parts.items(), (0.15, 0.55, 0.95), ("", "//", "..")):
        style = {"color": viridis(shade), "hatch": hatch, "edgecolor": "w"}
        axis.barh(names, shares * times, left=left, label=label, **style)
        left += shares * times
    axis.set(title=titled(rows), xlabel=TIME)
    axis.invert_yaxis()
    axis.legend(fontsize="small")
    return figure


def draw_exits(rows: list[dict], number: int, tokenizer, n_layers: int):
    """The exit layer of every token of one text, a line for each configuration, the full model's first."""
    rows = [row for row in rows if kind_of(row) != "static" and row["checkpoint"] is None][:12]
    length = min(18, max(len(row["prompts"][number]["tokens"]) for row in rows))
    figure, axis = pyplot().subplots(figsize=(max(7, 0.55 * length), 0.45 * len(rows) + 1.2))
    grid = np.full((len(rows), length), np.nan)
    for i, row in enumerate(rows):
        prompt = row["prompts"][number]
        for at, (token, layer) in enumerate(zip(prompt["tokens"][:length], prompt["exit_layers"])):
            grid[i, at] = layer
            style = {"color": "w" if layer < 0.6 * n_layers else "k", "fontsize": "x-small"}
            axis.text(at, i, f"{word(tokenizer, token)}\n{layer}", ha="center", va="center", **style)
    image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=1, vmax=n_layers)
    axis.set(title=f"{rows[0]['task']}: exit layer of every token of one text", xticks=[])
    axis.grid(False)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    figure.colorbar(image, label="exit layer")
    return figure


def word(tokenizer, token: int) -> str:
    return tokenizer.piece(token).strip() or "·"


# ---------------------------------------------------------------- what the layers predict


def draw_layers(rows: list[dict], model, tokenizer) -> dict:
    """Plots the layers' predictions in the full model's texts, and the exits of one text in every row."""
    title = titled(rows)
    texts = [(each["prompt_tokens"], each["tokens"]) for each in rows[0]["prompts"]]
    views = look(model, texts, CHECKS)
    prompt, output = max(texts[:20], key=lambda text: min(len(text[1]), 25))
    words = [word(tokenizer, token) for token in output[:30]]
    return {
        "ranks": draw_ranks(views, title),
        "confidence": draw_confidence(views, title),
        "reliability": draw_reliability(views, title),
        "jsd": draw_divergences(divergences(model, prompt, output)[:, :30], words, title),
        "exits": draw_exits(rows, texts.index((prompt, output)), tokenizer, model.config.n_layers),
    }


def draw_ranks(views: Views, title: str):
    """The rank of the last layer's token at every layer."""
    figure, axis = pyplot().subplots(figsize=(7, 4))
    axis.boxplot(list(views.ranks.T), whis=(1, 99), showfliers=False, medianprops={"color": "k"})
    title = f"{title}: {len(views.ranks)} positions (whiskers: 1 % and 99 %)"
    axis.set(yscale="log", xlabel="layer", ylabel="rank of the last layer's token", title=title)
    return figure


def draw_confidence(views: Views, title: str):
    """The mean confidence of each function, and how often the layer is right."""
    figure, axis = pyplot().subplots(figsize=(7, 4))
    layers = range(1, views.agrees.shape[1] + 1)
    axis.plot(layers, views.agrees.mean(0), color="k", marker="*", label="agrees with the last layer")
    for name, values in views.confidence.items():
        axis.plot(layers, values.mean(0), linestyle="--", label=f"confidence: {name}", **style_of(name))
    axis.set(xlabel="layer", ylabel="mean over the positions", ylim=(0, 1))
    axis.set(title=f"{title}: above the black line is over-confidence")
    axis.legend(fontsize="small")
    return figure


def draw_reliability(views: Views, title: str):
    """How often the layers are right at each confidence, for each function; a dot's size shows its share."""
    count = len(views.confidence)
    figure, axes = pyplot().subplots(1, count, figsize=(4 * count, 5.2), sharey=True, squeeze=False)
    for axis, (name, values) in zip(axes[0], views.confidence.items()):
        confidence, right = values.ravel(), views.agrees.ravel()
        centers, shares, counts = map(np.array, zip(*reliability(confidence, right)))
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axis.plot(centers, shares, color=style_of(name)["color"], zorder=2)
        sizes = 400 * counts / counts.sum() + 8
        axis.scatter(centers, shares, s=sizes, alpha=0.7, zorder=3, **style_of(name))
        text = f"{name}\nECE {calibration_error(confidence, right):.3f}, AUROC {auroc(confidence, right):.3f}"
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", title=text)
        axis.set_box_aspect(1)
    axes[0][0].set(ylabel="agrees with the last layer")
    figure.suptitle(f"{title}: how often a confidence is right")
    return figure


def draw_divergences(values: np.ndarray, words: list[str], title: str):
    """JSD to the last layer, by layer (upward) and token of one text."""
    figure, axis = pyplot().subplots(figsize=(max(6, 0.38 * len(words)), 4))
    extent = (-0.5, len(words) - 0.5, 0.5, len(values) + 0.5)
    scale = {"cmap": "cividis", "vmin": 0, "vmax": np.log(2)}
    image = axis.imshow(values, origin="lower", aspect="auto", extent=extent, **scale)
    axis.set(xlabel="token", ylabel="layer", title=f"{title.split(',')[0]}: one text")
    axis.grid(False)
    axis.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize="small")
    figure.colorbar(image, label="JSD to the last layer (nats)")
    return figure
