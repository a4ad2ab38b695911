"""What a finished run shows: tables against chance, and the images found for captions."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nso_hf.refusal import needs
from nso_hf.running.figures import with_error
from nso_hf.running.plots import plot_training
from nso_hf.tasks.clip.encoding import Encoded
from nso_hf.tasks.clip.pairs import Pairs
from nso_hf.tasks.clip.retrieval import RECALLS, best_images
from nso_hf.tasks.images.reading import read_image

needs("nso_hf.tasks.clip.report", "clip", "rich")

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

TITLES = {
    "loss": "Contrastive loss, nats",
    "eval_text_to_image_recall@10": "Validation recall@10, text → image",
    "clip/logit_scale": "Logit scale",
    "nso/perturbation_norm": "Norm of the perturbation applied",
}

_DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
_CLASSES = 20  # in the table of them
_LETTERS = 34  # in a line of a caption, all of them equally wide
_INCH, _LINE = 1.3, 0.16  # of an image, and of a line of text


def report(
    results: Mapping[str, Any], output: Path, encoded: Encoded | None, held_out: Pairs | None
) -> None:
    """Draw training.png, retrieval.png of the held-out pairs, and wise_ft.png; print retrieval,
    classification, what is kept and curvature, as far as they were measured, and where the files
    are."""
    files = ["results.json", "training.png", "model.safetensors", "open_clip_config.json"]
    plot_training(results, output / "training.png", TITLES, top=None)
    if encoded is not None and held_out is not None:
        plot_retrieval(encoded, held_out, output / "retrieval.png")
        files.insert(2, "retrieval.png")
    if results.get("wise_ft"):
        plot_wise_ft(results["wise_ft"], output / "wise_ft.png")
        files.insert(2, "wise_ft.png")
    console = Console(markup=False, emoji=False)  # classes are shown as they are written
    if results.get("retrieval"):
        console.print(_retrieval(results["retrieval"]))
    kinds = {"zero-shot": results.get("zero_shot"), "linear probe": results.get("linear_probe")}
    measured = {name: classified for name, classified in kinds.items() if classified}
    if measured:
        console.print(_classification(measured))
        console.print(_classes(measured))
    if results.get("forgetting"):
        console.print(_forgetting(results["forgetting"]))
    if results.get("wise_ft"):
        console.print(_wise_ft(results["wise_ft"]))
    if results.get("curvature"):
        console.print(_curvature(results["curvature"]))
    for collection, skipped in results["skipped"].items():
        if skipped:
            counts = ", ".join(f"{n} {kind}" for kind, n in skipped.items())
            console.print(f"Skipped of the {collection}: {counts}")
    console.print("Written:")
    for name in files:
        console.print(f"  {output / name}", soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    """A table whose first column is of words, the others of figures."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    return table


def _retrieval(retrieval: Mapping[str, Any]) -> Table:
    title = f"Retrieval among {retrieval['images']} images, {retrieval['texts']} captions; R@k in %"
    table = _table(title, "", "R@1", "R@5", "R@10", "mean rank", "median")
    for direction, name in _DIRECTIONS.items():
        for suffix, figures in [("", retrieval["metrics"]), (", chance", retrieval["chance"])]:
            recalls = [_percent(figures[f"{direction}_recall@{k}"]) for k in RECALLS]
            ranks = [figures.get(f"{direction}_{kind}_rank") for kind in ("mean", "median")]
            cells = ["" if rank is None else f"{rank:.1f}" for rank in ranks]
            table.add_row(name + suffix, *recalls, *cells)
    return table


def _classification(kinds: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("Classification, %", "", "top-1", "top-5", "per class", "chance", "majority")
    for name, c in kinds.items():
        cells = [_percent(c[key]) for key in ("top5", "mean_per_class", "chance", "majority")]
        top1 = with_error(100 * c["top1"], 100 * c["stderr"])
        table.add_row(f"{name}, {c['images']} images of {c['classes']} classes", top1, *cells)
    return table


def _classes(kinds: Mapping[str, Mapping[str, Any]]) -> Table:
    """The accuracy in each class, the most frequent ones first, beside that of blind guesses."""
    per_class = {name: c["per_class"] for name, c in kinds.items()}
    first = next(iter(per_class.values()))
    largest = sorted(first, key=lambda label: -first[label]["images"])[:_CLASSES]
    table = _table("Accuracy in each class, %", "class", "images", *kinds)
    for label in largest:
        found = [classes.get(label, {}).get("accuracy") for classes in per_class.values()]
        table.add_row(label, str(first[label]["images"]), *map(_percent, found))
    table.add_section()
    for name, key in {"chance": "chance", "always the largest class": "majority"}.items():
        table.add_row(name, "", *(_percent(c[key]) for c in kinds.values()))
    if len(first) > len(largest):
        table.caption = f"{len(first) - len(largest)} more classes are in results.json"
    return table


def _forgetting(also: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("Zero-shot accuracy elsewhere, %", "", "before", "after", "change")
    for name, found in also.items():
        change = with_error(100 * found["change"], 100 * found["change_stderr"])
        table.add_row(name, _accuracy(found["before"]), _accuracy(found["after"]), change)
    return table


def _wise_ft(points: Sequence[Mapping[str, Any]]) -> Table:
    """From the weights before training (0) to those after it (1)."""
    also = list(points[0]["also"])
    table = _table("Weights between, zero-shot accuracy, %", "alpha", "the task", *also)
    for point in points:
        cells = [_accuracy(point["zero_shot"]), *(_accuracy(point["also"][name]) for name in also)]
        table.add_row(f"{point['alpha']:g}", *cells)
    return table


def _accuracy(found: Mapping[str, float]) -> str:
    return with_error(100 * found["accuracy"], 100 * found["stderr"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _curvature(towers: Mapping[str, Mapping[str, float]]) -> Table:
    table = _table("Hessian of the training loss", "weights", "trace", "largest eigenvalue")
    for name, c in towers.items():
        eigenvalue = with_error(c["lambda_max"], c["lambda_max_residual"])
        table.add_row(name, with_error(c["trace"], c["trace_stderr"]), eigenvalue)
    return table


def plot_retrieval(
    encoded: Encoded, pairs: Pairs, path: Path, *, queries: int = 8, found: int = 6
) -> None:
    """Draw whole captions, evenly spaced over the collection, each with the images that score best
    for it; right ones are framed."""
    from matplotlib.figure import Figure

    found = min(found, len(encoded))
    step = max(1, len(encoded) // queries)
    rows = list(range(step // 2, len(encoded), step))[:queries]
    ranked = {row: best_images(encoded, row, found) for row in rows}
    wanted = {encoded.index[number] for numbers in ranked.values() for number in numbers}
    images = {i: read_image(pair.image) for i, pair in enumerate(pairs) if i in wanted}
    captions = {row: textwrap.wrap(str(encoded.captions[row]), _LETTERS) for row in rows}
    heights = [max(_INCH, _LINE * (len(lines) + 1)) for lines in captions.values()]
    figure = Figure(
        figsize=(_INCH * (found + 2), sum(heights) + 0.7), dpi=120, layout="constrained"
    )
    axes = figure.subplots(
        len(rows),
        found + 1,
        squeeze=False,
        gridspec_kw={"width_ratios": [2] + [1] * found, "height_ratios": heights},
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
    for line, (row, numbers) in zip(axes, ranked.items(), strict=True):
        text = "\n".join(captions[row])
        line[0].text(0, 0.5, text, parse_math=False, va="center", family="monospace", size=8)
        for axis, number in zip(line[1:], numbers, strict=False):
            axis.imshow(images[encoded.index[number]])
            if encoded.captions[number] == encoded.captions[row]:
                for side in axis.spines.values():
                    side.set_visible(True)
                    side.set_color("C2")
                    side.set_linewidth(3)
    figure.suptitle(
        f"The {found} images that score best for each caption, of {len(encoded)}; best first.\n"
        "Green frame: the caption's own image. No frame in a row: it is not among them.",
        fontsize=10,
    )
    figure.savefig(path)


def plot_wise_ft(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy elsewhere against that on the task, a panel for each collection, along the
    weights from before training (alpha 0) to after it (1)."""
    from matplotlib.figure import Figure

    points = sorted(points, key=lambda point: point["alpha"])
    task = [point["zero_shot"] for point in points]
    collections = list(points[0]["also"])
    width = max(5.5, 4 * len(collections))  # inches
    figure = Figure(figsize=(width, 4), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(collections), squeeze=False)
    for axis, name in zip(axes[0], collections, strict=True):
        also = [point["also"][name] for point in points]
        x, xerr, y, yerr = (
            [100 * each[figure] for each in found]
            for found in (task, also)
            for figure in ("accuracy", "stderr")
        )
        axis.errorbar(x, y, yerr, xerr, fmt="o-", ecolor="0.75", elinewidth=1)
        for number, (point, *place) in enumerate(zip(points, x, y, strict=True)):
            axis.annotate(
                f"{point['alpha']:g}",
                place,
                xytext=(7, 5) if number % 2 == 0 else (-7, -13),
                textcoords="offset points",
                ha="left" if number % 2 == 0 else "right",
            )
        axis.set_xlabel("zero-shot accuracy on the task, %")
        axis.set_title(name)
    axes[0, 0].set_ylabel("zero-shot accuracy elsewhere, %")
    figure.suptitle("Weights from before training (0) to after it (1)", fontsize=10)
    figure.savefig(path)
