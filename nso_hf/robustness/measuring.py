"""What of a model survives changes to its weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean, stdev

from torch import nn

from nso_hf.refusal import check_integer, check_positive, refusal
from nso_hf.robustness.figures import Batch, Figures, figures
from nso_hf.robustness.matrices import check_matrices
from nso_hf.robustness.noise import weight_noise
from nso_hf.robustness.pruning import check_sparsity, pruned
from nso_hf.robustness.quantisation import check_bits, check_group_size, round_to_nearest


@dataclass(frozen=True)
class Row:
    """How well a model does after a change of some strength."""

    kind: str
    """"none"; "bits" (of a row), "bits in groups of 64"; "noise", "relative noise"; "sparsity"."""
    strength: float | None
    loss: float
    stderr: float
    """Of the loss: over examples, and over draws of the noise."""
    accuracy: float | None
    """Share of the classes, or of the tokens, that are right; None where the loss is of another
    kind than the cross-entropy of logits."""
    accuracy_stderr: float | None
    ece: float | None
    """The expected calibration error."""


Change = tuple[str, float | None, list[AbstractContextManager[None]]]
"""Kind, strength and the contexts in which a model is changed, one for each draw."""


def robustness(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    bits: Sequence[int] = (8, 4, 3, 2),
    group_sizes: Sequence[int | None] = (None, 64),
    noise: Sequence[float] = (0.005, 0.01, 0.02, 0.05),
    relative_noise: Sequence[float] = (0.05, 0.1, 0.2, 0.5),
    sparsity: Sequence[float] = (0.5, 0.7, 0.9),
    num_samples: int = 5,
    seed: int = 0,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """How well a model does as it is, quantised, with noise in its weights, and pruned. It is left
    as it was: weights bit for bit, mode, gradients, random state.

    Args:
        batches: dicts that `model(**batch)` takes and returns a `loss` for.
        bits: of a weight; see `round_to_nearest`.
        group_sizes: weights of a row that share a scale; None: all of them.
        noise: standard deviations; see `weight_noise`.
        relative_noise: over the root mean square of a row.
        sparsity: shares of the weights that are set to zero; see `pruned`.
        num_samples: draws of the noise, that the figures are the means of.
        seed: of the noise, the same for every model and strength.
        on_row: called with each row as it is measured.

    Raises:
        ValueError: a strength is out of range, there are no batches, or the model has no linear or
            convolution layer.
    """
    check_strengths(bits, group_sizes, noise, relative_noise, sparsity, num_samples)
    check_matrices(model)
    given = list(batches)
    if not given:
        raise refusal("batches", given, "there are none", "Give at least one")
    changes: list[Change] = [("none", None, [nullcontext()])]
    for size in group_sizes if bits else ():
        kind = "bits" if size is None else f"bits in groups of {size}"
        changes += [(kind, b, [round_to_nearest(model, bits=b, group_size=size)]) for b in bits]
    for relative, strengths in ((False, noise), (True, relative_noise)):
        for std in strengths:
            draws = [
                weight_noise(model, std=std, relative=relative, seed=seed * num_samples + draw)
                for draw in range(num_samples)
            ]
            changes.append(("relative noise" if relative else "noise", std, list(draws)))
    changes += [("sparsity", share, [pruned(model, sparsity=share)]) for share in sparsity]
    rows = []
    with _evaluated(model):
        for change in changes:
            rows.append(_row(model, given, *change))
            on_row(rows[-1])
    return rows


def check_strengths(
    bits: Sequence[int],
    group_sizes: Sequence[int | None],
    noise: Sequence[float],
    relative_noise: Sequence[float],
    sparsity: Sequence[float],
    num_samples: int,
) -> None:
    """
    Raises:
        ValueError: one is out of range.
    """
    strengths = {"bits": bits, "group_sizes": group_sizes, "noise": noise}
    strengths |= {"relative_noise": relative_noise, "sparsity": sparsity}
    for option, values in strengths.items():
        if len(set(values)) < len(values):
            raise refusal(option, list(values), "has one twice", "Name each once")
    for each in bits:
        check_bits(each)
    if bits and not group_sizes:
        cure = "Name sizes, or none for the scale of a row, or leave both out"
        raise refusal("group_sizes", [], f"without any, bits={list(bits)} have no scale", cure)
    for size in group_sizes:
        check_group_size(size)
    for std in noise:
        check_positive("noise", std, "Typical: 0.005 to 0.05")
    for std in relative_noise:
        check_positive("relative_noise", std, "Typical: 0.05 to 0.5")
    for share in sparsity:
        check_sparsity(share)
    check_integer("num_samples", num_samples, 1, "Typical: 5")


def _row(
    model: nn.Module,
    batches: Sequence[Batch],
    kind: str,
    strength: float | None,
    draws: Sequence[AbstractContextManager[None]],
) -> Row:
    found: list[Figures] = []
    for change in draws:
        with change:
            found.append(figures(model, batches))
    losses = [each.loss for each in found]
    accuracies = [each.accuracy for each in found if each.accuracy is not None]
    errors = [each.accuracy_stderr for each in found if each.accuracy_stderr is not None]
    gaps = [each.ece for each in found if each.ece is not None]
    return Row(
        kind=kind,
        strength=strength,
        loss=fmean(losses),
        stderr=_stderr(losses, [each.loss_stderr for each in found]),
        accuracy=fmean(accuracies) if accuracies else None,
        accuracy_stderr=_stderr(accuracies, errors) if accuracies else None,
        ece=fmean(gaps) if gaps else None,
    )


def _stderr(means: Sequence[float], errors: Sequence[float]) -> float:
    """Of the mean of draws, each with its error over the same examples."""
    if not all(map(math.isfinite, means)):  # of weights that changed too much
        return math.nan
    between = stdev(means) ** 2 / len(means) if len(means) > 1 else 0.0
    return math.sqrt(fmean(errors) ** 2 + between)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards each module is in its own."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
