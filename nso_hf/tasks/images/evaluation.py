"""What an encoder is worth for the task to come: a linear probe, and fine-tuning."""

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ViTMAEModel, set_seed

from nso_hf.refusal import refusal
from nso_hf.tasks.images.arguments import MAEConfig
from nso_hf.tasks.images.classification import Classification, classification, linear_probe
from nso_hf.tasks.images.dataset import Images, Labelled
from nso_hf.tasks.images.models import ViTMAEForPreTraining, classifier_of, representations
from nso_hf.trainer import NSOTrainer


def labelled_sets(
    train: Images, test: Images, examples_per_class: int | None, seed: int
) -> tuple[Labelled, Labelled, list[str]]:
    """The labelled training images, the test images, and the classes, sorted. Of each class as many
    training images are drawn as asked for, or all there are.

    Raises:
        ValueError: there are fewer of a class, or not two classes, or classes in the test alone.
    """
    counts = Counter(label for label in train.labels if label is not None)
    classes = sorted(counts)
    if len(classes) < 2:
        rule = f"its images have {len(classes)} class(es): nothing is to be told apart"
        raise refusal("target_data", train.name, rule, "Use images of two classes or more")
    if unknown := {label for label in test.labels if label is not None} - counts.keys():
        rule = f"no training image has the class {min(unknown)!r} of the test"
        raise refusal("target_data", train.name, rule, "Give both splits the same classes")
    if not any(label is not None for label in test.labels):
        rule = "no test image has a class"
        raise refusal("target_data", test.name, rule, "Use images with classes")
    rarest = min(classes, key=lambda label: counts[label])
    if examples_per_class is not None and examples_per_class > counts[rarest]:
        rule = f"of class {rarest!r} there are {counts[rarest]}"
        cure = f"Use at most {counts[rarest]}, or leave it out for all"
        raise refusal("examples_per_class", examples_per_class, rule, cure)
    rng, drawn = np.random.default_rng(seed), []
    for label in classes:
        members = [i for i, other in enumerate(train.labels) if other == label]
        size = examples_per_class or len(members)
        drawn += sorted(rng.choice(members, size, replace=False).tolist())
    tested = [i for i, label in enumerate(test.labels) if label is not None]
    number = {label: index for index, label in enumerate(classes)}
    targets = (
        [number[str(images.labels[index])] for index in indices]
        for images, indices in ((train, drawn), (test, tested))
    )
    return Labelled(train, drawn, next(targets)), Labelled(test, tested, next(targets)), classes


@torch.no_grad()
def encoded(
    encoder: ViTMAEModel, examples: Labelled, *, batch_size: int, device: torch.device
) -> Tensor:
    """h(x) of images, (n, D), float32 on the CPU. The encoder is left on the device, in evaluation
    mode."""
    nn.Module.to(encoder, device).eval()
    batches = torch.tensor(examples.indices).split(batch_size)
    found = [
        representations(encoder, examples.images.batch(batch.tolist()).to(device)).float().cpu()
        for batch in batches
    ]
    return torch.cat(found)


def probed(
    model: ViTMAEForPreTraining,
    train: Labelled,
    test: Labelled,
    classes: Sequence[str],
    args: MAEConfig,
) -> Classification:
    """The test accuracy of a linear probe on the encoder's representations."""
    size = args.per_device_eval_batch_size
    h, tested = (
        encoded(model.vit, examples, batch_size=size, device=args.device)
        for examples in (train, test)
    )
    return linear_probe(h, train.targets, tested, test.targets, classes)


def fine_tuned(
    model: ViTMAEForPreTraining,
    train: Labelled,
    test: Labelled,
    classes: Sequence[str],
    args: MAEConfig,
    *,
    epochs: float,
    learning_rate: float,
) -> Classification:
    """The test accuracy of a copy of the encoder with a linear head, all of it fine-tuned with the
    options of `args` (those of NSO among them) but for these."""
    set_seed(args.seed)
    ours = copy.copy(args)
    ours.output_dir = str(Path(str(args.output_dir)) / "fine_tuned")
    ours.num_train_epochs, ours.max_steps, ours.learning_rate = epochs, -1, learning_rate
    ours.warmup_steps = 0  # those of pretraining may be more than there are here
    ours.save_strategy, ours.eval_strategy = "no", "no"
    ours.load_best_model_at_end, ours.report_to = False, []
    classifier = classifier_of(model, len(classes))
    trainer = NSOTrainer(model=classifier, args=ours, train_dataset=train)
    trainer.train()
    logits = torch.as_tensor(trainer.predict(test).predictions)
    return classification(logits.argmax(dim=1), test.targets, classes)
