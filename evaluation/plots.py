"""Pictures of what was measured. matplotlib is needed for this alone."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from common.errors import UserError
from evaluation.analysis import Views, auroc, calibration_error, divergences, look, reliability
from evaluation.figures import pareto
from evaluation.table import TITLES
from training.runs import read_log


def pyplot():
    """matplotlib.pyplot, drawing into files. Raises ValueError if it is not there."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
                         "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.dpi": 120})  # fmt: skip
    return plt


def depth_color(plt, layer: int, n_layers: int):
    """The colour of a layer, from the lowest (dark) to the last (bright)."""
    return plt.get_cmap("viridis")(0.9 * layer / n_layers)


def draw_training(log: Path) -> Path:
    """Training loss, and for each validation file loss and agreement of every exit, against steps, from a log.jsonl of train.py; into a PNG
    beside it, which is returned. Raises ValueError for a file that is not such a log."""
    try:
        rows = read_log(Path(log))
        training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        curves = defaultdict(lambda: defaultdict(list))  # file -> layer -> (step, loss, agreement)
        for row in rows:
            for layer, pair in row.get("layers", {}).items():
                curves[row["dev"]][int(layer)].append((row["step"], *pair))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{log}: not a log of train.py ({error})") from None
    if not training:
        raise UserError(f"{log}: not a log of train.py, or one without a step yet")
    plt = pyplot()
    figure, axes = plt.subplots(2, max(1, len(curves)), figsize=(5 * max(1, len(curves)), 7), squeeze=False, sharex=True)
    for column, (file, layers) in enumerate(curves.items() or [("", {})]):
        loss, agreement = axes[:, column]
        loss.plot(*zip(*smoothed(training)), color="0.75", linewidth=1, label="training, deepest layer of the step")
        for layer, points in sorted(layers.items()):
            steps, losses, same = zip(*points)
            style = {"color": depth_color(plt, layer, max(layers)), "marker": ".", "label": f"layer {layer}"}
            loss.plot(steps, losses, **style)
            agreement.plot(steps, same, **style)
        loss.set(title=Path(file).parent.name or file, ylabel="loss (nats a target)", ylim=zoom(training, layers))
        agreement.set(xlabel="step", ylabel="agreement with the last layer", ylim=(None, 1.01))
        loss.legend(fontsize="small")
    out = Path(log).with_suffix(".png")
    figure.savefig(out)
    plt.close(figure)
    return out


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most 200 points, each the mean of its stretch."""
    size = -(-len(points) // 200)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def zoom(training: list[tuple[int, float]], layers: dict) -> tuple[float, float]:
    """Limits of the loss that leave out the first steps' fall."""
    seen = [loss for _, loss in training[len(training) // 10 :]] + [loss for points in layers.values() for _, loss, _ in points]
    return min(seen) - 0.1, max(seen) + 0.1


# ---------------------------------------------------------------- evaluation

ASKED = ("softmax", "weighted", "jsd")  # confidence functions whose judgement is drawn
COLORS = {"softmax": "C0", "weighted": "C1", "jsd": "C2", "static": "C3", "full": "k"}
MARKERS = {"none": "o", "fixed": "s", "decaying": "v", "adaptive": "D"}


def draw_evaluation(folder: Path, rows: list[dict], model, tokenizer) -> list[Path]:
    """Pictures of the rows of eval.py, and of what the layers of the model see in the texts that it wrote; returns the files. Rows of a
    sweep, which keep no texts, give fewer."""
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
            texts = [(each["prompt_tokens"], each["tokens"]) for each in own[0]["prompts"]]
            views, L = look(model, texts, ASKED), model.config.n_layers
            made[f"{name}-ranks"] = draw_ranks(plt, views)
            made[f"{name}-confidence"] = draw_confidence(plt, views)
            made[f"{name}-reliability"] = draw_reliability(plt, views)
            prompt, output = max(texts[:20], key=lambda text: min(len(text[1]), 25))
            words = [piece(tokenizer, token) for token in output[:30]]
            made[f"{name}-jsd"] = draw_divergences(plt, divergences(model, prompt, output)[:, :30], words)
            made[f"{name}-exits"] = draw_exits(plt, own[1:], texts.index((prompt, output)), tokenizer, L)
    paths = []
    for name, figure in made.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
            plt.close(figure)
    return paths


def piece(tokenizer, token: int) -> str:
    return tokenizer.id_to_piece(token).replace("▁", " ").strip() or "·"


def leading_score(row: dict) -> float:
    """The first score, in points; of a task without, ROUGE-L to the full model's text."""
    return 100 * next(iter(row["scores"].values()), row["rougeL_full"])


def score_title(row: dict) -> str:
    name = next(iter(row["scores"]), "ROUGE-L to the full model's text")
    return TITLES.get(name, name)


def kind(row: dict) -> str:
    """The colour's name of a row: its confidence function, or static, or full."""
    config = row["config"]
    return "full" if config["confidence"] is None else "static" if config["threshold"] == 0 else config["confidence"]


def draw_speed(plt, rows: list[dict]):
    """Quality against speed; colours are confidence functions, shapes pruning schedules, filled is verified; the Pareto front as a line."""
    figure, axis = plt.subplots(figsize=(7, 5))
    for row in rows:
        color, verified = COLORS.get(kind(row), "C5"), row["config"]["verify"]
        label = kind(row) + (f", {row['config']['prune']}" if kind(row) not in ("full", "static") else "") + ", verified" * verified
        label += ", copy" * (row["config"]["fill"] == "copy")
        spread = abs(np.array([row["speedup_ci"]]).T - row["speedup"])
        axis.errorbar(row["speedup"], leading_score(row), xerr=spread, color=color, alpha=0.8, label=label, linestyle="", linewidth=1,
                      marker="x" if row["config"]["fill"] == "copy" else MARKERS[row["config"]["prune"]],
                      markerfacecolor=color if verified or kind(row) == "full" else "none")  # fmt: skip
    points = {row["name"]: (row["speedup"], leading_score(row)) for row in rows}
    axis.plot(*zip(*sorted(points[name] for name in pareto(points))), color="0.7", linewidth=1, zorder=0, label="Pareto front")
    axis.set(xlabel="speed-up over the full model", ylabel=score_title(rows[0]), title=rows[0]["task"])
    handles = dict(zip(*reversed(axis.get_legend_handles_labels())))
    axis.legend(handles.values(), handles.keys(), fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_sweep(plt, rows: list[dict]):
    """Score and exit layer against the swept number with the most values, a line for each combination of the others; None if nothing
    swept can be an axis."""
    configs = [row["config"] for row in rows[1:]]
    swept = [name for name in configs[0] if len({str(config[name]) for config in configs}) > 1]
    sizes = {name: len({config[name] for config in configs}) for name in swept
             if all(type(config[name]) in (int, float) for config in configs)}  # fmt: skip
    if not sizes or max(sizes.values()) < 3:
        return None
    field, lines = max(sizes, key=sizes.get), defaultdict(list)
    for row, config in zip(rows[1:], configs):
        lines[" ".join(str(config[name]) for name in swept if name != field)].append((config[field], row))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    panels = {score_title(rows[0]): leading_score, "average exit layer": lambda row: row["avg_exit_layer"]}
    for axis, (title, function) in zip(axes, panels.items()):
        axis.axhline(function(rows[0]), color="k", linewidth=1, linestyle=":", label="full model")
        for name, points in lines.items():
            points = sorted((x, function(row)) for x, row in points)
            axis.plot(*zip(*points), marker="o", label=name, color=COLORS.get(name))
        axis.set(xlabel=field, ylabel=title, title=rows[0]["task"])
    axes[0].legend(fontsize="small")
    return figure


def draw_flops(plt, rows: list[dict]):
    """Confidence FLOPs a token of each function by pruning schedule."""
    table = {(kind(row), row["config"]["prune"]): row["confidence_flops_per_token"] for row in reversed(rows)
             if row["confidence_flops_per_token"] and not row["config"]["verify"] and row["config"]["fill"] == "parallel"}  # fmt: skip
    functions = [name for name in ASKED if any(function == name for function, _ in table)]
    if not functions:
        return None
    figure, axis = plt.subplots(figsize=(6, 4))
    for at, schedule in enumerate(MARKERS):
        bars = [(i, table[name, schedule]) for i, name in enumerate(functions) if (name, schedule) in table]
        if bars:
            axis.bar([i + 0.2 * (at - 1.5) for i, _ in bars], [value for _, value in bars], 0.18, label=f"pruning: {schedule}")
    axis.set(yscale="log", ylabel="confidence FLOPs a token", title=rows[0]["task"])
    axis.set_xticks(range(len(functions)), functions)
    figure.legend(fontsize="small", loc="outside upper center", ncols=len(MARKERS))
    return figure


def draw_ranks(plt, views: Views):
    """Rank of the last layer's token at every layer."""
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.boxplot(list(views.ranks.T), whis=(1, 99), showfliers=False, medianprops={"color": "C3"})
    axis.set(yscale="log", xlabel="layer", ylabel="rank", title="rank of the last layer's token (whiskers: 1 % and 99 % of positions)")
    return figure


def draw_confidence(plt, views: Views):
    """Mean confidence of each function beside how often the layer is right."""
    figure, axis = plt.subplots(figsize=(7, 4))
    layers = range(1, views.agrees.shape[1] + 1)
    axis.plot(layers, views.agrees.mean(0), color="k", marker="o", label="agrees with the last layer")
    for name, values in views.confidence.items():
        axis.plot(layers, values.mean(0), color=COLORS[name], marker=".", linestyle="--", label=f"confidence: {name}")
    axis.set(xlabel="layer", ylim=(0, 1), title="confidence above the black line is over-confidence")
    axis.legend(fontsize="small")
    return figure


def draw_reliability(plt, views: Views):
    """Of each function, over all layers, how often it is right at every confidence."""
    figure, axes = plt.subplots(1, len(views.confidence), figsize=(4 * len(views.confidence), 4.2), sharey=True)
    for axis, (name, values) in zip(axes, views.confidence.items()):
        confidence, right = values.ravel(), views.agrees.ravel()
        centers, shares, counts = map(np.array, zip(*reliability(confidence, right)))
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axis.plot(centers, shares, color=COLORS[name], zorder=2)
        axis.scatter(centers, shares, s=400 * counts / counts.sum() + 8, color=COLORS[name], alpha=0.7, zorder=3)
        area = auroc(confidence, right)
        title = f"{name}\nECE {calibration_error(confidence, right):.3f}" + ("" if area is None else f", AUROC {area:.3f}")
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", aspect="equal", title=title)
    axes[0].set(ylabel="agrees with the last layer")
    return figure


def draw_divergences(plt, values: np.ndarray, words: list[str]):
    """JSD to the last layer, layers upward, over the tokens of a text."""
    figure, axis = plt.subplots(figsize=(max(6, 0.38 * len(words)), 4))
    image = axis.imshow(values, origin="lower", aspect="auto", cmap="magma", vmin=0, vmax=np.log(2),
                        extent=(-0.5, len(words) - 0.5, 0.5, len(values) + 0.5))  # fmt: skip
    axis.set(ylabel="layer")
    axis.grid(False)
    axis.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize="small")
    figure.colorbar(image, label="JSD to the last layer (nats)")
    return figure


def draw_exits(plt, rows: list[dict], number: int, tokenizer, n_layers: int):
    """Exit layer of every token of one text, a line for each setting."""
    rows = [row for row in rows if kind(row) != "static"][:12]
    if not rows:
        return None
    length = min(30, max(len(row["prompts"][number]["tokens"]) for row in rows))
    figure, axis = plt.subplots(figsize=(max(7, 0.68 * length), 0.42 * len(rows) + 1.2))
    grid = np.full((len(rows), length), np.nan)
    for i, row in enumerate(rows):
        each = row["prompts"][number]
        for at, (token, layer) in enumerate(zip(each["tokens"][:length], each["exit_layers"])):
            grid[i, at] = layer
            dark = layer < 0.6 * n_layers
            axis.text(at, i, piece(tokenizer, token), ha="center", va="center", fontsize="x-small", color="w" if dark else "k")
    image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=1, vmax=n_layers)
    axis.grid(False)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_xticks([])
    figure.colorbar(image, label="exit layer", ticks=sorted({1, *np.unique(grid[~np.isnan(grid)]).astype(int).tolist(), n_layers}))
    return figure
