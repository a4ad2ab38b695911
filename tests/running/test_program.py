"""What the options of commands have in common."""

import pytest

from nso_hf.curvature.__main__ import parser as curvature
from nso_hf.robustness.__main__ import parser as robustness
from recipes.compare import parser as compare


@pytest.mark.parametrize("nothing", ["", " "])
@pytest.mark.parametrize(
    ("parser", "words", "option"),
    [
        (curvature, ["m", "--data", "d.jsonl"], "--output"),
        (robustness, ["m", "--data", "d.jsonl"], "--output"),
        (compare, ["f.yaml"], "--output_dir"),
    ],
)
def test_a_folder_has_a_name(capsys, parser, words, option, nothing):
    """An empty one would be the folder that the command is called in."""
    assert str(vars(parser().parse_args([*words, option, "x"]))[option[2:]]) == "x"
    with pytest.raises(SystemExit):
        parser().parse_args([*words, option, nothing])
    assert f"error: argument {option}: names no folder" in capsys.readouterr().err
