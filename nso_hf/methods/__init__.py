"""The methods: a name and the class that holds its update rule."""

from nso_hf.methods.base import Method, Point, Step
from nso_hf.methods.nso import NSO

__all__ = ["METHODS", "Method", "Point", "Step"]

METHODS: dict[str, type[Method]] = {
    "nso": NSO,
}
