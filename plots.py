"""Pictures of what was measured. matplotlib is needed for this alone."""

import json
from collections import defaultdict
from pathlib import Path


def pyplot():
    """matplotlib.pyplot, drawing into files. Raises ValueError if it is not there."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib; pip install matplotlib") from None
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
        rows = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
        training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        curves = defaultdict(lambda: defaultdict(list))  # file -> layer -> (step, loss, agreement)
        for row in rows:
            for layer, pair in row.get("layers", {}).items():
                curves[row["dev"]][int(layer)].append((row["step"], *pair))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{log}: not a log of train.py ({error})") from None
    if not training:
        raise ValueError(f"{log}: holds no step yet")
    plt = pyplot()
    figure, axes = plt.subplots(2, max(1, len(curves)), figsize=(5 * max(1, len(curves)), 7), squeeze=False, sharex=True)
    for column, (file, layers) in enumerate(curves.items() or [("", {})]):
        loss, agreement = axes[:, column]
        loss.plot(*zip(*smoothed(training)), color="0.75", linewidth=1, label="last layer, training")
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
