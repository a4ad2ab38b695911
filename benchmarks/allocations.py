"""Memory by accounting for every tensor's storage, not by the size of the process."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountAllocations(TorchDispatchMode):
    """Inside, sums up the storages that operations of this thread return, for as long as they live
    and in the size they have; what kernels take and give back within an operation is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        """The most bytes held at once, beyond those held at the start."""
        self._storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_plain(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(_is_plain, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in before:
                self._storages[storage._cdata] = StorageWeakRef(storage)
        self.peak = max(self.peak, self._held())
        return result

    def _held(self) -> int:
        held = 0
        for key, reference in list(self._storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._storages[key]
            else:
                held += storage.nbytes()
        return held


def _is_plain(value: Any) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter)
