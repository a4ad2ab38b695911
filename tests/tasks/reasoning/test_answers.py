"""Every completion that a recipe trains on is judged right, and no other is."""

import random
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nso_hf.tasks.reasoning.answers import MARKER, judge, normalise
from nso_hf.tasks.reasoning.examples import Example
from nso_hf.tasks.reasoning.prompts import PromptFormat
from nso_hf.tasks.reasoning.quantities import numbers, quantity
from tests.tiny_models import byte_tokenizer

PAGE = Path(__file__).parents[3] / "docs" / "judging.md"
FORMAT = PromptFormat(byte_tokenizer())


def completion(answer: str, rationale: str = "First this, then that.") -> str:
    """What the recipe trains on."""
    return FORMAT.completions(Example("question", answer, (rationale,)))[0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 apples and 4.5 pears", [3, Fraction(9, 2)]),
        ("$1,234.50, or -7", [Fraction(123450, 100), -7]),
        ("3 - 4 = -1", [3, 4, -1]),
        ("5-3", [5, 3]),
        ("3/4 of .5", [Fraction(3, 4), Fraction(1, 2)]),
        ("1/0", []),
        ("none", []),
        ("2.", [2]),
        ("1,2,3 and 1,234,567", [1, 2, 3, 1234567]),
        ("\N{MINUS SIGN}5", [-5]),
        ("9" * 5000 + " 3", [3]),
        ("2 million, 1.5e3, 10^4", [2_000_000, 1500, 10_000]),
        ("vitamin B12 and x_1", []),
    ],
)
def test_numbers(text, found):
    assert numbers(text) == found


def test_what_is_a_numeric_answer():
    numeric = ["4", "-4", "1,200", "$3.50", "3/4", "50%", "0.3125", "4 apples", "-$5", "1e-05"]
    assert all(map(quantity, numeric))
    others = [
        "four",
        "1,2,3",
        "1/0",
        "(B)",
        "yes",
        "12:30",
        "",
        "007",
        "5 or 6",
        "x + 5",
        "2020-1-2",
    ]
    assert not any(map(quantity, others))


@pytest.mark.parametrize(
    ("text", "answer", "prediction", "correct", "contains", "formatted"),
    [
        ("2 + 2 = 4. --> 4", "4", "4", True, True, True),
        ("2 + 2 = 4. --> 4.0 apples\nmore 7", "4", "4.0 apples", True, True, True),
        ("so 4 --> 5", "4", "5", False, True, True),
        ("the answer is 4", "4", "4", True, True, False),
        ("4 or maybe 5", "4", "5", False, True, False),
        ("no idea", "4", "", False, False, False),
        ("--> ", "4", "", False, False, False),
        ("a --> 4 --> 5", "4", "5", False, True, True),  # the last marker counts
        ("14", "4", "14", False, False, False),
        ("It is. --> (B)", "B", "(B)", True, True, True),
        ("--> ['-5', '2']", "['5', '2']", "['-5', '2']", False, False, True),
        ("--> [ '5', '2' ]", "['5', '2']", "[ '5', '2' ]", True, True, True),
        ("--> x - y", "x + y", "x - y", False, False, True),
        ("--> ()", "[]", "()", False, False, True),
        ("--> -5 degrees", "5 degrees", "-5 degrees", False, False, True),
        ("--> 00:34:28.", "00:34:28", "00:34:28.", True, True, True),
        ("so I pick this. --> A", "A", "A", True, True, True),
        ("It is a bank. --> B", "A", "B", False, True, True),
        ("It is one. --> B", "A", "B", False, False, True),
        ("It is. --> The Yes.", "yes", "The Yes.", True, True, True),
        ("well\nNo", "no", "No", True, True, False),
        ("nothing known", "no", "nothing known", False, False, False),
        ("", "no", "", False, False, False),
        ("so \\boxed{42}", "42", "42", True, True, False),
        ("--> 1 2\n3 4\nand 5", "1 2\n3 4", "1 2\n3 4\nand 5", False, True, True),
        ("--> 1 2\n3 4\n\nThat is all.", "1 2\n3 4", "1 2\n3 4", True, True, True),
    ],
)
def test_judge(text, answer, prediction, correct, contains, formatted):
    judgement = judge(text, answer)
    assert judgement.prediction == prediction
    assert judgement.correct is correct
    assert judgement.contains_answer is contains
    assert judgement.correct_format is formatted


def documented():
    """The rows of the page's table: gold, text, verdict."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[2] in ("right", "wrong"):
            yield [re.fullmatch(r"`(.*)`", cell)[1] for cell in cells[:2]] + [cells[2]]


@pytest.mark.parametrize(("answer", "text", "verdict"), list(documented()))
def test_the_rules_as_documented(answer, text, verdict):
    assert judge(f"so {MARKER} {text}", answer).correct is (verdict == "right")


def test_an_article_is_only_left_out_where_words_follow():
    assert normalise("(A)") == "a" and normalise("A dog!") == "dog"
    assert judge("--> A", "a").correct and not judge("--> B", "a").correct
    assert not judge("--> cat the", "the cat").correct


@pytest.mark.parametrize("gold", [None, ["5", "6"], {"text": "5"}, 5])
def test_a_right_answer_that_is_no_text_is_refused(gold):
    with pytest.raises(ValueError, match="a right answer is a text"):
        judge("--> 5", gold)


# For any gold answer: what is trained is right, and what was changed is wrong.

integers = st.integers(-(10**12), 10**12)
decimals = st.decimals(-(10**6), 10**6, allow_nan=False, allow_infinity=False, places=3)
fractions = st.builds("{}/{}".format, st.integers(-999, 999), st.integers(2, 999))
currencies = st.builds("{}{:,}".format, st.sampled_from("$€£"), st.integers(0, 10**7))
percents = st.builds("{}%".format, st.integers(0, 100))
units = st.builds("{} {}".format, st.integers(0, 999), st.sampled_from(["dollars", "km", "hours"]))
quantities = st.one_of(integers.map(str), decimals.map(str), fractions, currencies, percents, units)

words = st.text(
    st.sampled_from("abcdefghijklmnopqrstuvwxyzäöüßéабвгд北京大学हिन्दीकखاللغة"),
    min_size=2,
    max_size=9,
).filter(lambda word: normalise(word) not in ("an", "the") and word.isalpha())
phrases = st.lists(words, min_size=1, max_size=4).map(" ".join)
letters = st.lists(st.sampled_from("ABCDE"), min_size=1, max_size=4, unique=True).map(
    lambda chosen: ", ".join(sorted(chosen))
)
verdicts = st.sampled_from(["yes", "no", "True", "False"])
intervals = st.builds("[{}, {})".format, st.integers(-9, 9), st.integers(10, 99))
formulas = st.builds("{}x^2 + {}y".format, st.integers(2, 99), st.integers(2, 99))
latex = st.builds("\\frac{{{}}}{{{}}}".format, st.integers(1, 99), st.integers(2, 99))
grids = st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=4).map(
    lambda rows: "\n".join(" ".join(map(str, row)) for row in rows)
)
golds = st.one_of(quantities, phrases, letters, verdicts, intervals, formulas, latex, grids)
rationales = st.lists(
    st.sampled_from(
        [
            "So it is 3.",
            "2 H2 + O2 --> 2 H2O.",
            "<!-- a --> b",
            "Is it A?\n",
            "x = 5,",
            "\\boxed{7}",
        ]
    ),
    max_size=4,
).map(" ".join)


@settings(derandomize=True, max_examples=400, deadline=None)
@given(golds, rationales)
def test_what_is_trained_is_right(gold, rationale):
    judgement = judge(completion(gold, rationale), gold)
    assert judgement.correct and judgement.contains_answer and judgement.correct_format


def changed(gold: str, seed: int) -> str:
    """Another answer: one of its letters or digits is another one, or missing, or there twice."""
    choice = random.Random(seed)
    places = [i for i, c in enumerate(gold) if c.isalnum()]
    i = choice.choice(places)
    kinds = (
        [gold[i] * 2, "7" if gold[i] != "7" else "8"] if gold[i].isdigit() else [gold[i] * 2, "q"]
    )
    return gold[:i] + choice.choice(kinds) + gold[i + 1 :]


def means_the_same(gold: str, other: str) -> bool:
    """Whether the change happens to be none, read by Python's own means."""
    if normalise(gold) == normalise(other):
        return True
    plain = [re.sub(r"[$€£%,]|dollars|km|hours", "", text).strip() for text in (gold, other)]
    try:
        a, b = (Fraction(re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)) for text in plain)
    except (ValueError, ZeroDivisionError):
        return False
    return a == b


@settings(derandomize=True, max_examples=400, deadline=None)
@given(golds, rationales, st.integers(0, 10**6))
def test_what_was_changed_is_wrong(gold, rationale, seed):
    other = changed(gold, seed)
    if not means_the_same(gold, other):
        assert not judge(completion(other, rationale), gold).correct


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(max_size=200), st.text(max_size=40))
def test_any_text_can_be_judged(text, gold):
    judge(text, gold)
    judge(completion(gold, text), gold)


PARTS = [
    "1,111,",
    "9",
    "a b ",
    "1/",
    "'5' ",
    "$x ",
    "\\( ",
    "\\[ ",
    "\\frac{1}{",
    "\\boxed{",
    "--> ",
]


@pytest.mark.parametrize("part", PARTS)
def test_the_time_of_judging_is_linear_in_the_text(part):
    """A second of this process at most for 40,000 characters: an unclosed "\\(" took twenty."""
    text = part * (40_000 // len(part))
    start = time.process_time()
    judge(text, "5")
    judge(f"--> {text}", "a b")
    assert time.process_time() - start < 10
