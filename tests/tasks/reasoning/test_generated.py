"""Every task of reasoning-gym: its own answer is right, another is wrong."""

import pytest

from nso_hf.refusal import Refusal
from nso_hf.tasks.reasoning.answers import judge
from nso_hf.tasks.reasoning.generated import generate_examples
from nso_hf.tasks.reasoning.prompts import PromptFormat
from tests.tiny_models import byte_tokenizer

factory = pytest.importorskip("reasoning_gym.factory")

WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
NEEDS_OPTIONS = {"composite"}
SLOW = {"knight_swap"}  # searches for seconds per question


@pytest.mark.parametrize("task", sorted({*factory.DATASETS} - WITHOUT_ANSWER - NEEDS_OPTIONS))
def test_the_answer_of_each_task_is_right_and_another_is_wrong(task):
    examples = generate_examples(task, 1 if task in SLOW else 4, 1)
    prompts = PromptFormat(byte_tokenizer(), with_rationale=False)
    answers = [example.answer for example in examples]
    for example in examples:
        (completion,) = prompts.completions(example)
        assert judge(completion, example.answer).correct
        others = [a for a in answers if a.casefold() != example.answer.casefold()]
        others.append(f"{example.answer} 7")
        if len(example.answer.splitlines()) > 1:
            others += [f"{example.answer}\n7", example.answer.rpartition("\n")[0]]
        for other in others:
            assert not judge(f"--> {other}", example.answer).correct, (other, example.answer)


@pytest.mark.parametrize("task", sorted(WITHOUT_ANSWER))
def test_tasks_without_one_answer_are_refused(task):
    with pytest.raises(Refusal, match=rf"dataset='reasoning_gym:{task}': .* no text to train on"):
        generate_examples(task, 1, 1)


def test_tasks_that_need_options_are_refused_without():
    for task in NEEDS_OPTIONS:
        with pytest.raises(Refusal, match="dataset_kwargs"):
            generate_examples(task, 1, 1)
