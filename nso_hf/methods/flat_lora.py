"""Flat-LoRA (Li et al.; ICML 2025, arXiv 2409.14396): adapters that are trained under noise in the
weights they are going to be merged into.

    W0 = W0 + eps,    eps of output i ~ N(0, (f_t rho ||row i of W0 + s B A||)^2 / inputs)
    g = the adapters' gradient there,    f_t = (1 - cos(pi t/T))/2

with t/T the share of training that is over after this step. W0 is given back bit for bit. With
`two_sided` g is the mean of those at W0 + eps and W0 - eps.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nso_hf.backends import Weight
from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.options import Options, boolean, option, positive
from nso_hf.refusal import refusal
from nso_hf.step.adapters import adapted_layers
from nso_hf.step.rows import RowFactors, RowNoise
from nso_hf.step.selection import SelectionOptions, select_perturbed


@dataclass(frozen=True)
class FlatLoRAOptions(Options):
    rho: float = option(
        0.05, "Deviation of the noise over the norm of a row, > 0.", positive, "Typical: 0.05"
    )
    two_sided: bool = option(
        False, "Evaluate at W0 + eps and W0 - eps.", boolean, "Use true or false"
    )


class FlatLoRA(Method):
    Options = FlatLoRAOptions

    def selected(
        self, weights: Sequence[Weight], model: nn.Module, args: SelectionOptions
    ) -> list[Weight]:
        bases = [layer.base for layer in adapted_layers(model, weights)]
        if not bases:
            rule = f"{type(model).__name__} has no linear layer with a LoRA adapter"
            raise refusal("method", "flat_lora", rule, "Add one with peft's get_peft_model")
        return select_perturbed(bases, args, frozen=True)

    def points(self, step: Step) -> Generator[Point, Tensor, Tensor]:
        share = (1 - math.cos(math.pi * step.progress)) / 2
        moved = {weight.index for weight in step.weights}
        every = adapted_layers(step.model, step.all_weights)
        layers = [layer for layer in every if layer.base.index in moved]
        squares = [layer.squared_norms(step.backend) for layer in layers]
        norms = step.backend.total(torch.cat(squares)).sqrt().split([len(s) for s in squares])
        rows = RowFactors(
            {
                layer.base.index: norm.to(layer.base.data.device) / math.sqrt(layer.inputs)
                for layer, norm in zip(layers, norms, strict=True)
            }
        )
        columns = frozenset(layer.base.index for layer in layers if layer.transposed)
        std = share * self.options.rho
        eps = RowNoise(step.seed, step.number, 0, std, rows=rows, columns=columns)
        if not self.options.two_sided:
            return (yield Point(eps, last=True))
        above = yield Point(eps, weight=0.5)
        below = yield Point(eps, sign=-1, weight=0.5, last=True)
        return (above + below) / 2
