"""Which examples are trained on and which are judged by, as options of a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import IntervalStrategy, TrainingArguments

from nso_hf.companions.label_noise import with_label_noise
from nso_hf.refusal import check_integer, check_range, refusal
from nso_hf.tasks.classification.splitting import Splits, few, hold_out


@dataclass
class ProtocolOptions:
    """The examples are dealt out in this order, by one seed: test (where there is no such split),
    validation, few training examples; then some of these get wrong labels."""

    _argument_group_name = "protocol"
    _may_change = ("test",)  # when a run goes on

    train_size: int | None = field(
        default=None,
        metadata={"help": "Train on so many examples, of each class its share. Default: all."},
    )
    examples_per_class: int | None = field(
        default=None,
        metadata={"help": "Train on so many examples of each class; fewer are a part of more."},
    )
    validation_size: float = field(
        default=0.1,
        metadata={
            "help": "Training examples held out to choose by, with right labels: a share below 1, "
            "or a number."
        },
    )
    test_size: float = field(
        default=0.2,
        metadata={"help": "Test examples held out where there is no such split: as above."},
    )
    label_noise: float = field(
        default=0.0,
        metadata={
            "help": "Probability with which each training label becomes another one, drawn evenly."
        },
    )
    test: bool = field(
        default=True,
        metadata={
            "help": "Evaluate on the test examples after training. False leaves them unread, as "
            "for choosing options."
        },
    )

    def __post_init__(self) -> None:
        for option in ("train_size", "examples_per_class"):
            value = getattr(self, option)
            if value is not None:
                check_integer(option, value, 1, "Leave it out for all examples")
        if self.train_size is not None and self.examples_per_class is not None:
            rule = f"train_size={self.train_size} already says how many"
            raise refusal("examples_per_class", self.examples_per_class, rule, "Leave one out")
        for option in ("validation_size", "test_size"):
            value = getattr(self, option)
            check_range(option, value, 0, float("inf"), "0.1 holds out a tenth, 200 so many")
            if value >= 1:
                if value != int(value):
                    raise refusal(option, value, "neither a share nor a number", "Use 0.1, or 200")
                setattr(self, option, int(value))
        check_range("label_noise", self.label_noise, 0, 1, "Typical values are 0.2 to 0.6")

    def check(self, args: TrainingArguments) -> None:
        """
        Raises:
            ValueError: the options of training do not go with these.
        """
        if args.eval_strategy != "no" and not self.validation_size:
            value = IntervalStrategy(args.eval_strategy).value
            raise refusal("eval_strategy", value, "nothing to evaluate on", "Set --validation_size")

    def split(
        self, labels: Sequence[int], classes: Sequence[str], seed: int, *, has_test: bool
    ) -> Splits:
        """Deal out examples by their labels (n,), the numbers of `classes`.

        Args:
            seed: `args.data_seed`, or else `args.seed`.
            has_test: whether the test examples are others than these.

        Raises:
            ValueError: there are too few examples.
        """
        generator, every = torch.Generator().manual_seed(seed), torch.tensor(labels)
        rest, test = torch.arange(len(every)), torch.arange(0)
        if not has_test:
            if self.test and not self.test_size:
                cure = "Name a --test_split, set --test_size, or --test false"
                raise refusal("test_size", self.test_size, "nothing to test on", cure)
            rest, test = self._held_out("test_size", every, rest, classes, generator)
        rest, validation = self._held_out("validation_size", every, rest, classes, generator)
        counts = every[rest].bincount(minlength=len(classes))
        if self.train_size is not None:
            if self.train_size > len(rest):
                cure = "Lower it, or leave it out for all"
                raise refusal("train_size", self.train_size, f"there are {len(rest)}", cure)
            _, chosen = hold_out(every[rest], self.train_size, generator)
            rest = rest[chosen]
        if self.examples_per_class is not None:
            rarest = min((n, name) for n, name in zip(counts.tolist(), classes, strict=True) if n)
            if self.examples_per_class > rarest[0]:
                rule = f"of class {rarest[1]!r} there are {rarest[0]}"
                cure = f"Use at most {rarest[0]}, or leave it out for all"
                raise refusal("examples_per_class", self.examples_per_class, rule, cure)
            rest = rest[few(every[rest], self.examples_per_class, generator)]
        noisy = with_label_noise(
            every[rest], rate=self.label_noise, num_labels=len(classes), seed=generator
        )
        return Splits(rest.tolist(), validation.tolist(), test.tolist(), noisy.labels, every[rest])

    def _held_out(
        self,
        option: str,
        labels: torch.Tensor,
        indices: torch.Tensor,
        classes: Sequence[str],
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = getattr(self, option)
        number = round(size * len(indices)) if size < 1 else int(size)
        if size and not number:
            rule = f"of {len(indices)} examples that is none"
            raise refusal(option, size, rule, "Raise it, or give a number of examples")
        if number >= len(indices):
            rule = f"there are {len(indices)} examples"
            raise refusal(option, size, rule, "Lower it")
        kept, held = hold_out(labels[indices], number, generator)
        gone = set(labels[indices].tolist()) - set(labels[indices[kept]].tolist())
        if gone:
            rule = f"no training example of class {classes[min(gone)]!r} would be left"
            raise refusal(option, size, rule, "Lower it, or give the class more examples")
        return indices[kept], indices[held]
