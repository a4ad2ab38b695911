"""Every task of reasoning-gym: what is trained is judged right, and another answer wrong."""

import pytest
from reasoning_gym.factory import DATASETS

from nso_hf.reasoning.answers import judge
from nso_hf.reasoning.examples import Example
from nso_hf.reasoning.generated import generate_examples
from nso_hf.reasoning.prompts import PromptFormat
from tests.tiny_models import byte_tokenizer

WITHOUT_ITEMS_OF_ITS_OWN = {"composite"}  # made of other tasks
FORMAT = PromptFormat(byte_tokenizer())


def test_all_tasks_are_here():
    assert len(DATASETS) > 90
    for task in WITHOUT_ITEMS_OF_ITS_OWN:
        with pytest.raises(ValueError, match="dataset_kwargs"):
            generate_examples(task, 1, 0)


@pytest.mark.parametrize("task", sorted(set(DATASETS) - WITHOUT_ITEMS_OF_ITS_OWN))
def test_a_task_of_reasoning_gym(task):
    examples = generate_examples(task, 4, 10_000_000)
    for example in examples:
        rationale = "A first guess --> 7, then another."
        trained = Example(example.question, example.answer, (rationale,))
        (text,) = FORMAT.completions(trained)
        judgement = judge(text, example.answer)
        assert judgement.correct and judgement.contains_answer and judgement.correct_format
        # Answers of other items, one with a digit more, and one with a line more.
        others = [other.answer for other in examples if other.answer != example.answer]
        others += [f"{example.answer}7", f"7{example.answer}", f"{example.answer}\n7 q"]
        for other in others:
            (text,) = FORMAT.completions(Example(example.question, other, (rationale,)))
            is_right = judge(text, example.answer).correct
            first = other.splitlines()[0] if other else ""
            assert not is_right or first == example.answer or _same_number(first, example.answer)


def _same_number(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return False
