"""Reasoning tasks that are generated, with a rationale each, by the package reasoning-gym."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from nso_hf.refusal import needs, refusal
from nso_hf.tasks.reasoning.examples import Example

Metadata = Mapping[str, Any]


def _answer_cot(metadata: Metadata) -> str:
    steps = str(metadata["answer_cot"])
    return steps.rpartition("####")[0].strip() or steps.strip()


def _chain_sum(metadata: Metadata) -> str:
    first, *rest = re.findall(r"(?:^|[+-]) ?-?\d+", str(metadata["expression"]))
    total, steps = int(first.replace(" ", "")), []
    for term in rest:
        sign, value = term[0], int(term[1:])
        result = total + value if sign == "+" else total - value
        steps.append(f"{total} {sign} {value} = {result}.")
        total = result
    return " ".join(steps)


def _leg_counting(metadata: Metadata) -> str:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    steps, total = [], 0
    for animal, count in metadata["animals"].items():
        legs = count * ANIMALS[animal]
        steps.append(f"{count} {animal}s have {count} * {ANIMALS[animal]} = {legs} legs.")
        if len(steps) > 1:
            steps.append(f"{total} + {legs} = {total + legs}.")
        total += legs
    return " ".join(steps)


RATIONALES: dict[str, Callable[[Metadata], str]] = {
    "chain_sum": _chain_sum,
    "gsm_symbolic": _answer_cot,
    "leg_counting": _leg_counting,
}
"""Task -> the rationale made from an item's metadata. Other tasks have answers alone."""


def generate_examples(task: str, size: int, seed: int, **options: Any) -> list[Example]:
    """`size` items of a reasoning-gym task; `options` are the task's own.

    Raises:
        ValueError: no such task, it refuses its options, or its questions have no one answer.
    """
    needs(f"reasoning_gym:{task}", "recipes", "reasoning_gym")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        from difflib import get_close_matches

        near = get_close_matches(task, DATASETS, n=3) or sorted(RATIONALES)
        raise refusal("dataset", f"reasoning_gym:{task}", "no such task", f"Try {', '.join(near)}")
    try:
        items = reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:
        cure = f"See the options of the task {task} in reasoning-gym"
        raise refusal("dataset_kwargs", options, str(error), cure) from error
    rationale = RATIONALES.get(task)
    return [
        Example(
            item["question"],
            _answer(task, item["answer"]),
            (rationale(item["metadata"]),) if rationale else (),
        )
        for item in items
    ]


def _answer(task: str, answer: object) -> str:
    if not isinstance(answer, str):
        rule = f"the answer of a question is {answer!r}, no text to train on"
        raise refusal("dataset", f"reasoning_gym:{task}", rule, "Choose another task")
    return answer
