"""Every wrong input is refused when the options, the trainer or the recipe are built: option,
value, rule, cure."""

import re
from pathlib import Path

import pytest

from tests.refusals import LIBRARY, RECIPE, message

DOCUMENTED = (Path(__file__).parent.parent / "docs" / "refusals.md").read_text()


@pytest.mark.parametrize("name", [*LIBRARY, *RECIPE])
def test_a_wrong_input_gets_the_documented_message(name):
    text = message((LIBRARY | RECIPE)[name])
    assert f"| {name} | `{text.replace('|', '¦')}` |" in DOCUMENTED
    option, _, rest = text.partition("=")
    assert re.fullmatch(r"[\w*]+", option), "it begins with the option and its value"
    rule_and_cure = rest.partition(": ")[2]
    assert rule_and_cure.endswith(".") and ". " in rule_and_cure, "a rule, then a cure"


def test_nothing_is_written_before_a_refusal(tmp_path):
    from nso_hf.refusal import Refusal
    from tests.refusals import recipe

    with pytest.raises(Refusal):
        recipe("--sigma", "-1")(tmp_path)
    assert not (tmp_path / "out").exists()
    kept = '{"kept": true}'
    with pytest.raises(Refusal):
        recipe(write={"out/results.json": kept.replace("{", "{").replace("}", "}")})(tmp_path)
    assert (tmp_path / "out" / "results.json").read_text() == kept
