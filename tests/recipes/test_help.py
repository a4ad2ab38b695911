"""What `--help` of a recipe shows, and in which order."""

import re
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from nso_hf import NSOArguments
from nso_hf.running.command_line import RecipeParser
from nso_hf.tasks.clip.arguments import CLIPConfig
from recipes import image_classification, mae_pretraining, text_classification
from recipes.cot_finetuning import OPTIONS

KINDS = [
    OPTIONS,
    [CLIPConfig],
    mae_pretraining.OPTIONS,
    image_classification.OPTIONS,
    text_classification.OPTIONS,
]
IDS = ["cot", "clip", "mae", "images", "text"]


def listed(text):
    return re.findall(r"^  (?:-h, )?--(\w+)", text, re.M)


@pytest.mark.parametrize("kinds", KINDS, ids=IDS)
def test_own_options_come_first_and_all_of_them(kinds, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = listed(RecipeParser(kinds).format_help())
    training = {option.name for option in fields(TrainingArguments)}
    own = {o.name for kind in kinds for o in fields(kind)} - training
    assert set(names[: len(own)]) == own and len(names) == len(set(names))
    assert {o.name for o in fields(NSOArguments)} <= own and "learning_rate" in names
    assert len(names) - len(own) < 30  # the training options that most runs set, of some 120


@pytest.mark.parametrize("kinds", KINDS, ids=IDS)
def test_help_all_has_every_option(kinds, capsys):
    with pytest.raises(SystemExit) as exit_:
        RecipeParser(kinds).parse(["--help_all"])
    assert exit_.value.code == 0
    names = listed(capsys.readouterr().out)
    assert set(names) >= {o.name for kind in kinds for o in fields(kind) if o.init}
    assert len(names) == len(set(names))


def test_help_says_where_the_rest_is(capsys):
    with pytest.raises(SystemExit):
        RecipeParser(OPTIONS).parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert "--help_all" in lines[-1] and len(lines) < 320
