"""What a trainer counts: numbers, texts, tensors, and containers of them, among its attributes."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_LONG = 100
"""Items of a list; of a longer one nothing is copied, and what is appended is taken back."""
_MANY = 2**10
"""Items of another container, elements of a tensor; larger ones are left alone."""


@contextmanager
def counts_kept(trainer: object) -> Iterator[None]:
    """What the trainer and its `state` count is as before afterwards: tokens seen, metrics that are
    collected until the next log, lists that grow. What appears inside is removed."""
    holders = [vars(it) for it in (trainer, getattr(trainer, "state", None)) if it is not None]
    kept = [_kept_entries(attributes) for attributes in holders]
    try:
        yield
    finally:
        for put_back in kept:
            put_back()


def _kept_entries(entries: dict[Any, Any]) -> Callable[[], Any]:
    """What makes the counts among the entries as they are now again."""
    kept = {key: _kept(value) for key, value in entries.items() if not _is_ours(key)}

    def put_back() -> dict[Any, Any]:
        for key in [key for key in entries if key not in kept and not _is_ours(key)]:
            if _kept(entries[key]) is not None:
                del entries[key]
        for key, put_value_back in kept.items():
            if put_value_back is not None:
                entries[key] = put_value_back()
        return entries

    return put_back


def _is_ours(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("_nso_")


def _kept(value: Any) -> Callable[[], Any] | None:
    """What makes a value as it is now again, and returns it; None if it is no count."""
    if value is None or isinstance(value, (int, float, complex, str, bytes)):
        return lambda: value
    if isinstance(value, tuple) and all(_kept(item) is not None for item in value):
        return lambda: value
    if isinstance(value, Tensor):
        return _kept_tensor(value)
    if isinstance(value, list):
        return _kept_list(value)
    if isinstance(value, dict) and len(value) <= _MANY:
        return _kept_entries(value)
    if isinstance(value, (set, deque)) and len(value) <= _MANY:
        return _kept_items(value)
    return None


def _kept_tensor(tensor: Tensor) -> Callable[[], Tensor] | None:
    is_count = tensor.is_leaf and not tensor.requires_grad and tensor.numel() <= _MANY
    if not is_count or isinstance(tensor, nn.Parameter):
        return None
    before = tensor.clone()

    def put_back() -> Tensor:
        tensor.data.copy_(before)  # no edit: it may be a weight, detached, as it was
        return tensor

    return put_back


def _kept_list(items: list[Any]) -> Callable[[], list[Any]] | None:
    length = len(items)
    each = [_kept(item) for item in items] if length <= _LONG else []
    kept = [put_item_back for put_item_back in each if put_item_back is not None]
    if len(kept) < len(each):
        return None

    def put_back() -> list[Any]:
        del items[length:]
        items[: len(kept)] = [put_item_back() for put_item_back in kept]
        return items

    return put_back


def _kept_items(items: set[Any] | deque[Any]) -> Callable[[], Any]:
    before = list(items)

    def put_back() -> set[Any] | deque[Any]:
        items.clear()
        for item in before:
            items.add(item) if isinstance(items, set) else items.append(item)
        return items

    return put_back
