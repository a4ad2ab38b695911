"""What a run was asked for: recorded beside its checkpoints, compared when one is gone on from."""

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nso_hf import backends
from nso_hf.arguments import NSOArguments
from nso_hf.refusal import Refusal, refusal

_FILE = "options.json"
_NOT_RECORDED = (
    "output_dir",
    "logging_dir",
    "resume_from_checkpoint",
    "run_name",
    "local_rank",
    "hub_token",
)
_FIXED = {
    name: rule
    for rule, names in {
        "the optimizer and its schedule go on as the checkpoint has them": (
            "optim optim_args optim_target_modules learning_rate weight_decay adam_beta1 "
            "adam_beta2 adam_epsilon lr_scheduler_type"
        ),
        "it would go on with another loss": (
            "label_smoothing_factor label_names average_tokens_across_devices "
            "coca_caption_weight coca_contrastive_weight rademacher_strength rademacher_radius "
            "rademacher_draws mixup mixup_alpha mixup_place"
        ),
        "the data would come in another order": (
            "seed data_seed per_device_train_batch_size gradient_accumulation_steps processes "
            "auto_find_batch_size train_sampling_strategy length_column_name accelerator_config "
            "dataloader_drop_last dataloader_num_workers"
        ),
        "the checkpoint holds another kind of state": " ".join(("bf16", "fp16", *backends.OPTIONS)),
    }.items()
    for name in names.split()
}
"""Training options that must stay when a run goes on, and why."""
_OF_THE_METHOD = [option.name for option in fields(NSOArguments)]


class RecordedOptions(TrainerCallback):
    """The options of a run and the steps from which they were in force, in `options.json` in its
    output folder. As a callback of the trainer it writes them when training begins.

    Training options may change when a run goes on, but for those that a checkpoint fixes. Those of
    other dataclasses may not, but for the names in their attribute `_may_change`.

    Args:
        args: the training options.
        others: dataclasses of further options.
        checkpoint: the one to go on from, if any.

    Raises:
        ValueError: an option differs that must not, or the checkpoint has no record beside it.
    """

    def __init__(self, args: TrainingArguments, *others: Any, checkpoint: str | None) -> None:
        options = args.to_dict() | {"processes": args.world_size}
        fixed = dict(_FIXED)
        for other in others:
            mine = asdict(other)
            options |= mine
            may_change = getattr(other, "_may_change", ())
            fixed |= {name: "" for name in mine if name not in may_change}
        for name in _NOT_RECORDED:
            options.pop(name, None)
        options = json.loads(json.dumps(options, default=str))
        # `from_step` and the `options` in force from it on: first all, then those that changed.
        self.history: list[dict[str, Any]] = []
        self._facts: dict[str, str] = {}  # of this run
        self._recorded_facts: dict[str, str] = {}  # of the run that is gone on with
        self._resumes = checkpoint is not None
        self._seconds: dict[str, float] = {}  # of training, up to each checkpoint
        self.seconds_before = 0.0  # up to the one that is gone on from
        step = 0
        if checkpoint is not None:
            state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
            step = state.global_step
            record = _read(Path(checkpoint).parent / _FILE)
            self.history = [entry for entry in record["options"] if entry["from_step"] < step]
            self._recorded_facts = record["facts"]
            self._seconds = record.get("seconds", {})
            before = [seconds for at, seconds in self._seconds.items() if int(at) <= step]
            self.seconds_before = max(before, default=0.0)
        asked: dict[str, Any] = {}  # before
        for entry in self.history:
            asked |= entry["options"]
        changed = {n: v for n, v in options.items() if n not in asked or asked[n] != v}
        # Old and new value of what is not as it was at the checkpoint.
        self.changes = {name: (asked[name], changed[name]) for name in changed if name in asked}
        for name, (old, new) in self.changes.items():
            if name in fixed:
                raise _differs(name, new, f"this run began with {old!r}", fixed[name])
        if changed:
            self.history.append({"from_step": step, "options": changed})

    def check(self, option: str, value: object, what: str, fact: str) -> None:
        """Compare something that an option stands for, such as the `what` "training examples" of a
        data set, by a `fact` about it, such as a fingerprint.

        Raises:
            ValueError: it differs from the run that is gone on with.
        """
        self._facts[what] = fact
        if self._recorded_facts.get(what, fact) != fact:
            raise _differs(option, value, f"not the {what} that this run began with", "")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The Trainer goes on with the intervals of the checkpoint, whatever was asked for.
        state.compute_steps(args, state.max_steps)
        self._began = time.monotonic()
        self._check_that_changes_matter(state)
        if not state.is_world_process_zero:
            return
        if self._resumes:
            changes = "; ".join(f"{n} {old!r} -> {new!r}" for n, (old, new) in self.changes.items())
            how = f"changed: {changes}" if changes else "with the same options"
            print(f"\nGoing on from step {state.global_step}; {how}.")
        self._write(args)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            seconds = self.seconds_before + time.monotonic() - self._began
            self._seconds[str(state.global_step)] = round(seconds, 2)
            self._write(args)

    def _check_that_changes_matter(self, state: TrainerState) -> None:
        """
        Raises:
            ValueError: an option of the method changed, for a training that was done.
        """
        own = [name for name in self.changes if name in _OF_THE_METHOD]
        if own and state.global_step >= state.max_steps:
            old, new = self.changes[own[0]]
            rule = f"step {state.global_step} was the last, with {old!r}: none is left to train"
            cure = "Leave it as it was, train for more steps, or start anew elsewhere"
            raise refusal(own[0], new, rule, cure)

    def _write(self, args: TrainingArguments) -> None:
        record = {"options": self.history, "facts": self._facts, "seconds": self._seconds}
        path = Path(str(args.output_dir)) / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def fingerprint(items: Iterable[object]) -> str:
    """A digest of the representations of these items, in their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        rule = f"no {_FILE} beside it says what it was trained with ({error})"
        cure = "Put the one of its run there, or start anew from its weights"
        raise refusal("resume_from_checkpoint", str(path.parent), rule, cure) from error
    return record


def _differs(option: str, value: object, was: str, why: str) -> Refusal:
    rule = f"{was}; {why}" if why else was
    cure = "Go on with the same, or start anew with another --output_dir"
    return refusal(option, value, rule, cure)
