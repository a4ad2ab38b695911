from fractions import Fraction

import pytest

from nso_hf.reasoning.answers import is_numeric, judge, normalise, numbers


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
    ],
)
def test_numbers(text, found):
    assert numbers(text) == found


def test_what_is_a_numeric_answer():
    assert all(map(is_numeric, ["4", "-4", "1,200", "$3.50", "3/4", "50%", "0.3125"]))
    assert not any(map(is_numeric, ["four", "4 apples", "1,2,3", "1/0", "(B)", "yes", "12:30", ""]))


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
        ("a --> 4 --> 5", "4", "4 --> 5", True, True, False),
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
    ],
)
def test_judge(text, answer, prediction, correct, contains, formatted):
    judgement = judge(text, answer)
    assert judgement.prediction == prediction
    assert judgement.correct is correct
    assert judgement.contains_answer is contains
    assert judgement.correct_format is formatted


def test_an_article_alone_is_an_answer():
    assert normalise("(A)") == "a" and normalise("A dog!") == "dog"
    assert judge("--> A", "a").correct and not judge("--> B", "a").correct
