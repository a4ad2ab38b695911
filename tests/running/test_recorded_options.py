"""A run goes on as what it was: options and data are compared, and changes are kept."""

import json
from dataclasses import dataclass

import pytest

from nso_hf import NSOConfig, NSOTrainer
from nso_hf.running.recorded_options import RecordedOptions, fingerprint
from tests.reference import tiny_llama, token_data


@dataclass
class ModelOptions:
    _may_change = ("note",)

    width: int = 8
    targets: tuple[str, ...] = ("mlp",)
    note: str = ""


def run(folder, steps=2, checkpoint=None, fact="a", model=None, **options):
    base = {"max_steps": steps, "save_steps": 2, "logging_steps": 1, "save_strategy": "steps"}
    base |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "sigma": 0.02}
    args = NSOConfig(str(folder), **(base | options))
    recorded = RecordedOptions(args, model or ModelOptions(), checkpoint=checkpoint)
    recorded.check("data", "rows.jsonl", "rows", fingerprint([fact]))
    trainer = NSOTrainer(
        model=tiny_llama(), args=args, train_dataset=token_data(16), callbacks=[recorded]
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return recorded, trainer


def options_file(folder):
    return json.loads((folder / "options.json").read_text(encoding="utf-8"))


def test_what_changed_is_said_and_kept_with_its_step(tmp_path, capsys):
    first, _ = run(tmp_path)
    assert options_file(tmp_path)["options"] == first.history
    ((step, options),) = [tuple(entry.values()) for entry in first.history]
    assert step == 0 and options["sigma"] == 0.02 and options["width"] == 8
    assert "Going on" not in capsys.readouterr().out
    second, _ = run(tmp_path, 4, str(tmp_path / "checkpoint-2"), sigma=0.5, model=ModelOptions(8))
    changes = {"from_step": 2, "options": {"max_steps": 4, "sigma": 0.5}}
    assert second.history == [*first.history, changes]
    line = "Going on from step 2; changed: max_steps 2 -> 4; sigma 0.02 -> 0.5."
    assert line in capsys.readouterr().out
    # Once more from the earlier checkpoint: what was changed after it is forgotten.
    third, _ = run(tmp_path, 4, str(tmp_path / "checkpoint-2"), model=ModelOptions(note="again"))
    changes = {"from_step": 2, "options": {"max_steps": 4, "note": "again"}}
    assert third.history == options_file(tmp_path)["options"] == [*first.history, changes]
    # From the later one, nothing differs from the options in force there.
    fourth, _ = run(tmp_path, 4, str(tmp_path / "checkpoint-4"), model=ModelOptions(note="again"))
    assert fourth.history == third.history and not fourth.changes


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"model": ModelOptions(width=9)}, "width=9: this run began with 8. Go on with the same"),
        ({"model": ModelOptions(targets=("head",))}, r"targets=\['head'\]: this run began with \["),
        ({"learning_rate": 0.3}, "learning_rate=0.3: this run began with 5e-05; the optimizer and"),
        ({"optim": "adafactor"}, "optim='adafactor': this run began with 'adamw_torch"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: .*another loss"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size=4: .*in another order"),
        ({"seed": 1}, "seed=1: this run began with 42; the data would come in another order"),
        ({"fact": "b"}, "data='rows.jsonl': not the rows that this run began with"),
    ],
)
def test_what_makes_another_run_of_it_is_refused(tmp_path, options, refused):
    run(tmp_path)
    before = options_file(tmp_path)
    with pytest.raises(ValueError, match=refused):
        run(tmp_path, 4, str(tmp_path / "checkpoint-2"), **options)
    assert options_file(tmp_path) == before


def test_a_checkpoint_without_its_record_is_refused(tmp_path):
    run(tmp_path)
    (tmp_path / "options.json").write_text('{"options": [')
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint=.*no options.json beside it says"
    ):
        run(tmp_path, 4, str(tmp_path / "checkpoint-2"))


def test_intervals_asked_for_on_resuming_are_kept(tmp_path):
    """The Trainer goes on with those of the checkpoint."""
    run(tmp_path, 6, logging_steps=1, save_steps=2)
    _, trainer = run(tmp_path, 6, str(tmp_path / "checkpoint-2"), logging_steps=3, save_steps=3)
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [1, 2, 3, 6]
    assert (tmp_path / "checkpoint-3").exists()


def test_a_fingerprint_is_of_the_items_and_their_order():
    assert fingerprint(["a", "b"]) == fingerprint(iter(["a", "b"]))
    different = [["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], ["a\nb"], ["\ud800"]]
    assert len(set(map(fingerprint, different))) == len(different)
