"""Pictures of what the layers of a model see, of each position that `analysis.look` has read."""

import numpy as np

from evaluation.analysis import Views, auroc, calibration_error, reliability


def draw_ranks(plt, views: Views, title: str):
    """Rank of the last layer's token at every layer."""
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.boxplot(
        list(views.ranks.T), whis=(1, 99), showfliers=False, medianprops={"color": "k", "linewidth": 2}
    )
    axis.set(
        yscale="log",
        xlabel="layer",
        ylabel="rank of the last layer's token",
        title=f"{title}: {len(views.ranks)} positions (whiskers: 1 % and 99 %)",
    )
    return figure


def draw_confidence(plt, views: Views, styles: dict[str, dict], title: str):
    """Mean confidence of each function beside how often the layer is right."""
    figure, axis = plt.subplots(figsize=(7, 4))
    layers = range(1, views.agrees.shape[1] + 1)
    axis.plot(layers, views.agrees.mean(0), color="k", marker="*", label="agrees with the last layer")
    for name, values in views.confidence.items():
        axis.plot(layers, values.mean(0), linestyle="--", label=f"confidence: {name}", **styles[name])
    axis.set(
        xlabel="layer", ylim=(0, 1), title=f"{title}: confidence above the black line is over-confidence"
    )
    axis.legend(fontsize="small")
    return figure


def draw_reliability(plt, views: Views, styles: dict[str, dict], title: str):
    """Of each function, over all layers, how often it is right at every confidence; dots as large as their
    share."""
    count = len(views.confidence)
    figure, axes = plt.subplots(1, count, figsize=(4 * count, 5.2), sharey=True, squeeze=False)
    for axis, (name, values) in zip(axes[0], views.confidence.items()):
        confidence, right = values.ravel(), views.agrees.ravel()
        centers, shares, counts = map(np.array, zip(*reliability(confidence, right)))
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axis.plot(centers, shares, color=styles[name]["color"], zorder=2)
        axis.scatter(centers, shares, s=400 * counts / counts.sum() + 8, alpha=0.7, zorder=3, **styles[name])
        area = auroc(confidence, right)
        text = f"{name}\nECE {calibration_error(confidence, right):.3f}" + (
            "" if area is None else f", AUROC {area:.3f}"
        )
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", title=text)
        axis.set_box_aspect(1)
    axes[0][0].set(ylabel="agrees with the last layer")
    figure.suptitle(f"{title}: how often a confidence is right")
    return figure


def draw_divergences(plt, values: np.ndarray, words: list[str], title: str):
    """JSD to the last layer, layers upward, over the tokens of a text."""
    figure, axis = plt.subplots(figsize=(max(6, 0.38 * len(words)), 4))
    extent = (-0.5, len(words) - 0.5, 0.5, len(values) + 0.5)
    image = axis.imshow(
        values, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=np.log(2), extent=extent
    )
    axis.set(ylabel="layer", title=f"{title.split(',')[0]}: one text")
    axis.grid(False)
    axis.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize="small")
    figure.colorbar(image, label="JSD to the last layer (nats)")
    return figure
