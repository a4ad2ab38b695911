"""The methods: a name and the class that holds its update rule."""

from nso_hf.methods.asam import ASAM
from nso_hf.methods.async_sam import AsyncSAM
from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.bsam import BSAM
from nso_hf.methods.cr_sam import CRSAM
from nso_hf.methods.flat_lora import FlatLoRA
from nso_hf.methods.fsam import FSAM
from nso_hf.methods.hero import HERO
from nso_hf.methods.msam import MSAM
from nso_hf.methods.nso import NSO
from nso_hf.methods.rsam import RSAM
from nso_hf.methods.sam import SAM
from nso_hf.methods.usam import USAM
from nso_hf.methods.zo import ZO

__all__ = ["METHODS", "Method", "Point", "Step"]

METHODS: dict[str, type[Method]] = {
    "nso": NSO,
    "sam": SAM,
    "asam": ASAM,
    "usam": USAM,
    "rsam": RSAM,
    "bsam": BSAM,
    "fsam": FSAM,
    "cr_sam": CRSAM,
    "hero": HERO,
    "msam": MSAM,
    "async_sam": AsyncSAM,
    "flat_lora": FlatLoRA,
    "zo": ZO,
}
