"""What a finished run shows: tables against chance, and the images found for captions."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nso_hf.clip.evaluation import Encoded, best_images
from nso_hf.clip.pairs import Pairs, read_image

_DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
_MEASURES = ("recall@1", "recall@5", "recall@10", "mean_rank", "median_rank")


def print_results(results: Mapping[str, Any], output: Path, files: Sequence[str]) -> None:
    """Print retrieval, classification and curvature, as far as they were measured, and where the
    files are."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    retrieval = results.get("retrieval")
    if retrieval:
        size = f"{retrieval['images']} images, {retrieval['texts']} captions"
        table = Table(title=f"Retrieval among {size}")
        for column in ("direction", *_MEASURES):
            table.add_column(
                column.replace("_", " "), justify="right" if column in _MEASURES else "left"
            )
        for direction, title in _DIRECTIONS.items():
            for label, figures in [("", retrieval["metrics"]), (", chance", retrieval["chance"])]:
                cells = [
                    _cell(measure, figures.get(f"{direction}_{measure}")) for measure in _MEASURES
                ]
                table.add_row(title + label, *cells)
        console.print(table)
    kinds = {"zero_shot": "zero-shot", "linear_probe": "linear probe, two folds"}
    measured = {name: title for name, title in kinds.items() if results.get(name)}
    if measured:
        table = Table(title="Classification")
        for column in (
            "",
            "images",
            "classes",
            "top-1",
            "top-5",
            "mean per class",
            "chance",
            "largest class",
        ):
            table.add_column(column, justify="right" if column else "left")
        for name, title in measured.items():
            c = results[name]
            top5 = "" if c["top5"] is None else f"{c['top5']:.1%}"
            table.add_row(
                title,
                str(c["images"]),
                str(c["classes"]),
                f"{c['top1']:.1%} ± {c['stderr']:.1%}",
                top5,
                f"{c['mean_per_class']:.1%}",
                f"{c['chance']:.1%}",
                f"{c['majority']:.1%}",
            )
        console.print(table)
    if results.get("curvature"):
        table = Table(title="Hessian of the training loss")
        for column in ("weights", "trace", "largest eigenvalue"):
            table.add_column(column, justify="left" if column == "weights" else "right")
        for name, c in results["curvature"].items():
            table.add_row(
                name,
                f"{c['trace']:.4g} ± {c['trace_stderr']:.2g}",
                f"{c['lambda_max']:.4g} ± {c['lambda_max_residual']:.2g}",
            )
        console.print(table)
    for collection, skipped in results["skipped"].items():
        if skipped:
            counts = ", ".join(f"{n} {kind}" for kind, n in skipped.items())
            console.print(f"Skipped of the {collection}: {counts}")
    console.print("Written: " + ", ".join(str(output / name) for name in files), soft_wrap=True)


def _cell(measure: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if measure.startswith("recall") else f"{value:.1f}"


def plot_retrieval(
    encoded: Encoded, pairs: Pairs, path: Path, *, queries: int = 8, found: int = 6
) -> None:
    """Draw captions, evenly spaced over the collection, each with the images that score best for
    it; right ones are framed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    step = max(1, len(encoded) // queries)
    rows = list(range(step // 2, len(encoded), step))[:queries]
    ranked = {row: best_images(encoded, row, found) for row in rows}
    wanted = {encoded.index[number] for numbers in ranked.values() for number in numbers}
    images = {i: read_image(pair.image) for i, pair in enumerate(pairs) if i in wanted}
    figure, axes = plt.subplots(
        len(rows),
        found + 1,
        figsize=(1.3 * (found + 2), 1.3 * len(rows)),
        squeeze=False,
        gridspec_kw={"width_ratios": [2.2] + [1] * found},
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
    for line, (row, numbers) in zip(axes, ranked.items(), strict=True):
        caption = str(encoded.captions[row])
        line[0].text(0, 0.5, textwrap.fill(caption[:90], 22), va="center", fontsize=8)
        for axis, number in zip(line[1:], numbers, strict=False):
            axis.imshow(images[encoded.index[number]])
            if encoded.captions[number] == caption:
                for side in axis.spines.values():
                    side.set_visible(True)
                    side.set_color("C2")
                    side.set_linewidth(3)
    figure.suptitle(f"Captions and the images found for them among {len(encoded)}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
