"""What can be known before work starts is refused before it starts."""

import errno
import os

import pytest
from safetensors import SafetensorError
from transformers import TrainerState

from nso_hf import NSOConfig
from nso_hf.running.checkpoints import resumable
from nso_hf.running.readiness import check_ready

METRICS = ["loss", "accuracy"]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


def arguments(folder, **options):
    return NSOConfig(str(folder), **({"use_cpu": True, "report_to": "none"} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_for_best_model": "acuracy"}, "'acuracy': unknown. Use loss, accuracy"),
        ({"metric_for_best_model": "eval_f1"}, "metric_for_best_model='eval_f1': unknown"),
        ({"report_to": "neptune"}, "report_to='neptune': NeptuneCallback requires"),
        ({"report_to": "wandbb"}, "report_to='wandbb': wandbb is not supported"),
        ({"optim": "grokadamw"}, "optim='grokadamw': Please install grokadamw"),
        ({"optim": "galore_adamw"}, "optim='galore_adamw': "),
        ({"optim": "schedule_free_adamw"}, "optim='schedule_free_adamw': You need to install"),
        ({"max_steps": 0}, "max_steps=0: leaves nothing to train"),
        ({"max_steps": -3}, "max_steps=-3: leaves nothing to train"),
        ({"num_train_epochs": 0}, "num_train_epochs=0: leaves nothing to train"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be at least 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: must be at least 1"),
        ({"save_steps": -5}, "save_steps=-5: must be above 0"),
        ({"eval_strategy": "steps", "eval_steps": -1}, "eval_steps=-1: must be above 0"),
        ({"fp16": True}, "fp16=True: needs an accelerator"),
        ({"seed": -1}, "seed=-1: must be an integer from 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296: must be an integer from 0 to 4294967295"),
        ({"data_seed": -1}, "data_seed=-1: must be an integer from 0 to 4294967295"),
    ],
)
def test_options_that_fail_later_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        check_ready(arguments(tmp_path / "out", **options), METRICS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 1, "bf16": True, "max_grad_norm": 0.0},
        {**EVALUATED, "metric_for_best_model": "eval_accuracy"},
        {**EVALUATED, "save_steps": 0.5, "save_strategy": "steps", "optim": "adafactor"},
        {"save_strategy": "no", "save_steps": -1},
        {"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATED},
    ],
)
def test_options_that_work_are_not(tmp_path, options):
    check_ready(arguments(tmp_path / "out", **options), METRICS)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/within"):
        with pytest.raises(ValueError, match=r"output_dir='.*': /.*file is a file"):
            check_ready(arguments(tmp_path / name), METRICS)
    with pytest.raises(ValueError, match=r"output_dir='': names no folder"):
        check_ready(arguments(""), METRICS)
    check_ready(arguments(tmp_path / "out" / "a"), METRICS)
    assert os.listdir(tmp_path) == ["file"], "trying it leaves nothing behind"

    def cannot(*_: object, **__: object) -> None:  # root may write almost anywhere
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", cannot)
    with pytest.raises(ValueError, match=r"output_dir='.*out/a': /.* cannot be written to"):
        check_ready(arguments(tmp_path / "out" / "a"), METRICS)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 251392 vs 251280"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed"),
    ],
)
def test_a_full_disk_ends_in_a_line_that_says_how_to_go_on(tmp_path, error):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-6").mkdir()  # cut off
    with pytest.raises(ValueError) as caught, resumable(arguments(tmp_path), TrainerState):
        raise error
    assert "checkpoint-4; the same command with --resume_from_checkpoint last" in str(caught.value)


def test_another_error_stays_as_it_is(tmp_path):
    error = RuntimeError("size mismatch")
    with pytest.raises(RuntimeError) as caught, resumable(arguments(tmp_path), TrainerState):
        raise error
    assert caught.value is error
