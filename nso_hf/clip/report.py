"""What a finished run shows: tables against chance, and the images found for captions."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nso_hf.clip.encoding import Encoded
from nso_hf.clip.pairs import Pairs, read_image
from nso_hf.clip.retrieval import RECALLS, best_images

if TYPE_CHECKING:
    from rich.table import Table

_DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}


def print_results(results: Mapping[str, Any], output: Path, files: Sequence[str]) -> None:
    """Print retrieval, classification and curvature, as far as they were measured, and where the
    files are."""
    from rich.console import Console

    console = Console()
    if results.get("retrieval"):
        console.print(_retrieval(results["retrieval"]))
    kinds = {"zero-shot": results.get("zero_shot"), "linear probe": results.get("linear_probe")}
    if any(kinds.values()):
        console.print(_classification({name: c for name, c in kinds.items() if c}))
    if results.get("curvature"):
        console.print(_curvature(results["curvature"]))
    for collection, skipped in results["skipped"].items():
        if skipped:
            counts = ", ".join(f"{n} {kind}" for kind, n in skipped.items())
            console.print(f"Skipped of the {collection}: {counts}")
    console.print("Written: " + ", ".join(str(output / name) for name in files), soft_wrap=True)


def _table(title: str, columns: Sequence[str]) -> "Table":
    """A table whose first column is of words, the others of figures."""
    from rich.table import Table

    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _retrieval(retrieval: Mapping[str, Any]) -> "Table":
    title = f"Retrieval among {retrieval['images']} images, {retrieval['texts']} captions"
    table = _table(title, ["", "R@1", "R@5", "R@10", "mean rank", "median"])
    for direction, name in _DIRECTIONS.items():
        for suffix, figures in [("", retrieval["metrics"]), (", chance", retrieval["chance"])]:
            recalls = [f"{figures[f'{direction}_recall@{k}']:.1%}" for k in RECALLS]
            ranks = [figures.get(f"{direction}_{kind}_rank") for kind in ("mean", "median")]
            cells = ["" if rank is None else f"{rank:.1f}" for rank in ranks]
            table.add_row(name + suffix, *recalls, *cells)
    return table


def _classification(kinds: Mapping[str, Mapping[str, Any]]) -> "Table":
    images = " and ".join(dict.fromkeys(str(c["images"]) for c in kinds.values()))
    number = next(iter(kinds.values()))["classes"]
    columns = ["", "top-1", "top-5", "per class", "chance", "majority"]
    table = _table(f"Classification of {images} images, {number} classes", columns)
    for name, c in kinds.items():
        shares = [c[key] for key in ("top5", "mean_per_class", "chance", "majority")]
        cells = ["" if share is None else f"{share:.1%}" for share in shares]
        table.add_row(name, f"{c['top1']:.1%} ± {c['stderr']:.1%}", *cells)
    return table


def _curvature(towers: Mapping[str, Mapping[str, float]]) -> "Table":
    table = _table("Hessian of the training loss", ["weights", "trace", "largest eigenvalue"])
    for name, c in towers.items():
        trace = f"{c['trace']:.4g} ± {c['trace_stderr']:.2g}"
        table.add_row(name, trace, f"{c['lambda_max']:.4g} ± {c['lambda_max_residual']:.2g}")
    return table


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
        gridspec_kw={"width_ratios": [1.6] + [1] * found},
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
    for line, (row, numbers) in zip(axes, ranked.items(), strict=True):
        caption = str(encoded.captions[row])
        line[0].text(
            0, 0.5, textwrap.fill(caption[:90], 22), parse_math=False, va="center", fontsize=8
        )
        for axis, number in zip(line[1:], numbers, strict=False):
            axis.imshow(images[encoded.index[number]])
            if encoded.captions[number] == caption:
                for side in axis.spines.values():
                    side.set_visible(True)
                    side.set_color("C2")
                    side.set_linewidth(3)
    figure.suptitle(
        f"Captions and the images found for them among {len(encoded)} pairs", fontsize=10
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
