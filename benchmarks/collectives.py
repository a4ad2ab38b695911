"""Counting what processes send each other."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SCALARS = 64  # bytes: norms, losses, counts


class CountCollectives(TorchDispatchMode):
    """Inside, counts the collectives of `torch.distributed` and their bytes, those of the larger
    side: what a gather returns, what a reduction takes. Those of a few numbers are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional"):
            sizes = [t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if max(sizes, default=0) > _SCALARS:
                self.calls[name.strip("_")] += 1
                self.bytes[name.strip("_")] += max(sizes)
        return func(*args, **(kwargs or {}))
