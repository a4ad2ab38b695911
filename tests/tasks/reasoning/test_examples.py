import json

import pytest

from nso_hf.tasks.reasoning.examples import (
    PRESETS,
    Columns,
    Example,
    hold_out,
    load_examples,
    without_questions_of,
)
from nso_hf.tasks.reasoning.generated import RATIONALES, generate_examples
from nso_hf.tasks.reasoning.prompts import PromptFormat, training_rows
from tests.tiny_models import byte_tokenizer

PLAIN = Columns()


def test_presets_read_their_data_sets():
    gsm8k = {"question": "q", "answer": "48/2 = <<48/2=24>>24 clips.\nSo 1,024.\n#### 1,024"}
    parsed = PRESETS["gsm8k"].parse(gsm8k, PLAIN)
    assert parsed == Example("q", "1024", ("48/2 = 24 clips.\nSo 1,024.",))
    choices = {"label": ["A", "B"], "text": ["bank", "tree"]}
    commonsense = {"question": "Where?", "choices": choices, "answerKey": "B"}
    assert PRESETS["commonsense_qa"].parse(commonsense, PLAIN) == Example(
        "Where?\nAnswer choices: (A) bank (B) tree", "B"
    )
    strategy = {"question": "q", "answer": False, "facts": ["One.", "Two."]}
    assert PRESETS["strategy_qa"].parse(strategy, PLAIN) == Example("q", "no", ("One. Two.",))
    several = {"question": "q", "answer": 3, "rationale": ["one", "two", ""]}
    assert PRESETS["columns"].parse(several, PLAIN) == Example("q", "3", ("one", "two"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_local_files_with_columns_of_any_name(tmp_path, suffix):
    from datasets import Dataset

    rows = [{"problem": f"p{i}", "why": f"w{i}", "result": str(i)} for i in range(5)]
    data = Dataset.from_list(rows)
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        path = str(folder / f"{split}.{suffix}")
        if suffix == "csv":
            data.to_csv(path)
        elif suffix == "parquet":
            data.to_parquet(path)
        else:
            data.to_json(path, lines=suffix == "jsonl")
    columns = Columns("problem", "why", "result")
    expected = [Example(f"p{i}", str(i), (f"w{i}",)) for i in range(5)]
    assert load_examples(str(folder), "test", columns=columns) == expected
    assert load_examples(str(folder / f"train.{suffix}"), "train", columns=columns) == expected
    assert load_examples(str(folder / f"train.{suffix}"), "test", columns=columns) is None


def test_no_question_is_in_two_splits():
    examples = [Example(f"q{i % 10}", "a", (f"r{i}",)) for i in range(30)]
    kept, held = hold_out(examples, 3, seed=0)
    assert len(kept) == 21 and len(held) == 9
    assert not {e.question for e in kept} & {e.question for e in held}
    assert hold_out(examples, 3, seed=0) == (kept, held)
    assert without_questions_of(examples, held) == kept


@pytest.mark.parametrize(
    ("task", "options"),
    [("chain_sum", {}), ("gsm_symbolic", {}), ("leg_counting", {})],
)
def test_generated_rationales_lead_to_the_answer(task, options):
    """The last number of each rationale is the answer, and each equation in it holds."""
    import re

    from nso_hf.tasks.reasoning.quantities import numbers

    assert task in RATIONALES
    examples = generate_examples(task, 50, 7, **options)
    assert len({example.question for example in examples}) > 40
    for example in examples:
        (rationale,) = example.rationales
        assert "####" not in rationale
        if task != "gsm_symbolic":
            assert numbers(rationale)[-1] == numbers(example.answer)[0]
            for left, right in re.findall(r"([-\d +*]+?) = (-?\d+)", rationale):
                assert eval(left) == int(right)


def test_other_tasks_have_answers_alone():
    examples = generate_examples("letter_counting", 3, 0)
    assert all(example.answer and not example.rationales for example in examples)


def test_prompts_plain_and_chat():
    example = Example("1 + 1?", "2", ("one and one", "count"))
    plain = PromptFormat(byte_tokenizer())
    assert plain.prompt("1 + 1?") == "1 + 1? ###"
    assert plain.completions(example) == [" one and one --> 2", " count --> 2"]
    assert PromptFormat(byte_tokenizer(), with_rationale=False).completions(example) == [" --> 2"]
    chat = PromptFormat(byte_tokenizer(chat=True), chat=True, instruction="Think.")
    assert chat.prompt("1 + 1?") == "<user>1 + 1?\nThink.</s><assistant>"
    assert chat.completions(example)[0] == "one and one --> 2"


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_loss_is_on_the_completion_alone(encoder_decoder):
    tokenizer = byte_tokenizer()
    prompt_format = PromptFormat(tokenizer, is_encoder_decoder=encoder_decoder)
    rows, left_out = training_rows([Example("q", "2", ("because", "x" * 99))], prompt_format, 60)
    assert left_out == 1 and len(rows) == 1
    (row,) = rows
    trained = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(trained) == " because --> 2</s>"
    if encoder_decoder:
        assert tokenizer.decode(row["input_ids"]) == "q ###"
    else:
        assert tokenizer.decode(row["input_ids"]) == "q ### because --> 2</s>"
        assert row["labels"][: len("q ###")] == [-100] * len("q ###")


def test_rows_of_a_preset_are_refused_with_what_they_hold(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "no marker"}))
    with pytest.raises(ValueError, match="expects 'rationale #### answer', not 'no marker'"):
        load_examples(str(path), "train", preset="gsm8k")
