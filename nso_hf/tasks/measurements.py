"""What recipes measure beside their task: curvature, and the same training without a method."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from nso_hf.arguments import NSOConfig
from nso_hf.curvature.options import CurvatureOptions
from nso_hf.refusal import refusal
from nso_hf.running.checkpoints import last_complete_checkpoint
from nso_hf.step.sigma import RISE

Config = TypeVar("Config", bound=NSOConfig)


@dataclass
class MeasurementOptions(CurvatureOptions):
    _may_change = (*CurvatureOptions._may_change, "compare_plain")

    compare_plain: bool = field(
        default=False,
        metadata={
            "help": "Train plainly (sigma 0) too, from the same start with the same data and "
            "steps, in OUTPUT_DIR/plain, and show both."
        },
    )

    def check(self, args: NSOConfig) -> None:
        """
        Raises:
            ValueError: the options of training do not go with these.
        """
        if self.compare_plain and args.sigma == 0:
            cure = "Raise --sigma, or leave it out"
            raise refusal("compare_plain", True, "at sigma 0 both would be plain training", cure)


def plainly(args: Config) -> Config:
    """The same training at sigma 0 in a folder of its own; where the other goes on, so does it."""
    plain = copy.copy(args)
    plain.method, plain.method_kwargs = "nso", None
    plain.sigma, plain.log_sharpness = 0.0, False
    plain.sigma_rise, plain.sigma_hold = RISE, False
    output = Path(str(args.output_dir)) / "plain"
    last = last_complete_checkpoint(output, args.world_size)
    resumes = args.resume_from_checkpoint is not None and last is not None
    plain.output_dir, plain.resume_from_checkpoint = str(output), str(last) if resumes else None
    return plain
