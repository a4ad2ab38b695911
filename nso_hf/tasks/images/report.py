"""What a finished run shows: a table against chance and the untrained encoder, and images as the
model reconstructs them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nso_hf.refusal import needs
from nso_hf.running.figures import with_error
from nso_hf.running.plots import plot_training
from nso_hf.tasks.images.dataset import Images
from nso_hf.tasks.images.models import ViTMAEForPreTraining

needs("nso_hf.tasks.images.report", "images", "rich")

from rich.console import Console  # noqa: E402

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "loss": "Loss",
    "rademacher/complexity": "Rademacher complexity of the target",
    "nso/perturbation_norm": "Norm of the perturbation applied",
}
_SHOWN = 8  # images


def report(
    results: Mapping[str, Any], output: Path, model: ViTMAEForPreTraining, images: Images
) -> None:
    """Write results.json, training.png and mae.png to `output`; print the accuracies, what was
    logged, and where the files are."""
    text = json.dumps(results, indent=2) + "\n"
    (output / "results.json").write_text(text, encoding="utf-8")
    plot_training(results, output / "training.png", TITLES, top=None)
    plot_reconstruction(model, images, output / "mae.png")
    console = Console(markup=False, emoji=False)
    if results["evaluation"]:
        console.print(_table(results))
    for name in ("eval_loss", *TITLES):
        values = [entry[name] for entry in results["log"] if name in entry]
        if values:
            console.print(f"{name}: {values[0]:.4g} in the first log, {values[-1]:.4g} in the last")
    console.print("Written:")
    for name in ("results.json", "training.png", "mae.png", "model.safetensors"):
        console.print(f"  {output / name}", soft_wrap=True)


def _table(results: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    found, options = results["evaluation"], results["evaluation_options"]
    first = next(iter(found.values()))
    how = {"linear_probe": "linear probe", "fine_tune": "fine-tuned"}[options["evaluation"]]
    labelled = f"{results['labelled_images']} labelled images"
    table = Table(title=f"{how}, {labelled}; accuracy on {first['images']} test images, %")
    for name in ("encoder", "accuracy", "mean per class"):
        table.add_column(name, justify="left" if name == "encoder" else "right")
    for name, c in found.items():
        accuracy = with_error(100 * c["top1"], 100 * c["stderr"])
        table.add_row(name, accuracy, f"{100 * c['mean_per_class']:.1f}")
    table.add_section()
    table.add_row(f"chance, {first['classes']} classes", f"{100 * first['chance']:.1f}", "")
    table.add_row("always the largest class", f"{100 * first['majority']:.1f}", "")
    return table


@torch.no_grad()
def reconstructed(model: ViTMAEForPreTraining, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Images as the model sees them, masked patches being 0, and as it reconstructs them, seen
    patches being the image's own: each (n, C, S, S). The same patches each time."""
    generator = torch.Generator().manual_seed(0)
    patches = model.patchify(pixel_values)
    noise = torch.rand(patches.shape[:2], generator=generator)
    model.eval()  # type: ignore[no-untyped-call]
    outputs = model(pixel_values, noise=noise.to(pixel_values.device))
    made = outputs.logits
    if model.config.norm_pix_loss:  # it learns patches less their mean, by their spread
        spread = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        made = made * spread + patches.mean(dim=-1, keepdim=True)
    masked = outputs.mask[..., None]
    return model.unpatchify(patches * (1 - masked)), model.unpatchify(
        patches * (1 - masked) + made * masked
    )


def plot_reconstruction(model: ViTMAEForPreTraining, images: Images, path: Path) -> None:
    """Draw some images, evenly spaced over the collection: whole, masked, and reconstructed."""
    from matplotlib.figure import Figure

    chosen = range(0, len(images), max(1, len(images) // _SHOWN))[:_SHOWN]
    whole = images.batch(chosen)
    seen, made = reconstructed(model.cpu(), whole)
    rows = {"image": whole, "masked": seen, "reconstructed": made}
    figure = Figure(figsize=(1.2 * len(chosen), 4.2), layout="constrained")
    axes = figure.subplots(len(rows), len(chosen), squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        shown = images.pixels.shown(pictures).numpy()
        for axis, picture in zip(line, shown, strict=True):
            grey = picture.shape[-1] == 1
            axis.imshow(picture.squeeze(-1) if grey else picture, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name)
    ratio = model.config.mask_ratio
    figure.suptitle(f"{images.name}, {ratio:.0%} of the patches masked", fontsize=10)
    figure.savefig(path, dpi=120)
