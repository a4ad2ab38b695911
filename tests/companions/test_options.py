"""Companions as options of a recipe."""

import pytest
from transformers import EarlyStoppingCallback, TrainingArguments

from nso_hf.companions import DistancePenalty, EMACallback, SWACallback
from nso_hf.companions.options import CompanionOptions


def test_each_is_a_callback():
    assert CompanionOptions().callbacks() == []
    for option, value, kind in [
        ("ema_decay", 0.9, EMACallback),
        ("swa_start", 0.5, SWACallback),
        ("l2_sp", 0.1, DistancePenalty),
        ("early_stopping_patience", 2, EarlyStoppingCallback),
    ]:
        (callback,) = CompanionOptions(**{option: value}).callbacks()
        assert type(callback) is kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.5}, "ema_decay=1.5: must be a finite number, in"),
        ({"swa_start": -1.0}, "swa_start=-1.0: must be a finite number, in"),
        ({"l2_sp": 0.0}, "l2_sp=0.0: must be a finite number above 0"),
        ({"early_stopping_patience": 0}, "early_stopping_patience=0: must be an integer"),
        ({"ema_decay": 0.9, "swa_start": 0.5}, "swa_start=0.5: training ends with one average"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CompanionOptions(**options)


def test_what_does_not_go_with_training(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="early_stopping_patience=2: there is no best model"):
        CompanionOptions(early_stopping_patience=2).check(args)
    args.load_best_model_at_end = True
    with pytest.raises(ValueError, match=r"ema_decay=0\.9: --load_best_model_at_end puts another"):
        CompanionOptions(ema_decay=0.9).check(args)
    CompanionOptions(early_stopping_patience=2).check(args)
