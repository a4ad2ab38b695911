"""CLIP models on the command line: their options, and what they are measured on."""

from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from nso_hf.curvature.batches import Batch
from nso_hf.refusal import needs, refusal
from nso_hf.running.packages import in_package
from nso_hf.tasks.clip.checkpoint import is_clip, is_of_open_clip, name_of
from nso_hf.tasks.clip.options import DataOptions, EvaluationOptions

if TYPE_CHECKING:
    from nso_hf.tasks.clip.models import ClipModel

OPTIONS = {
    "label_column": "column, or entry of the shards' json files, of the class: zero-shot "
    "classification is measured (default: finding image and caption among those of a batch)",
    "image_column": "of the image, as nso clip takes it",
    "caption_column": "of the caption, likewise",
    "csv_separator": "between the columns of a .csv file (default: a tab)",
    "templates": "prompts of a class, as nso clip takes them (default: openai)",
    "class_names": "names of the classes, likewise",
}
"""Name -> what it says."""

_OF_CLASSES = ("templates", "class_names")
_PACKAGES = ("open_clip", "webdataset", "datasets", "sklearn")


def check_clip_options(options: Namespace, checkpoints: list[str]) -> None:
    """
    Raises:
        ValueError: one is wrong, or has no effect on these checkpoints.
        MissingPackage: the extra is not installed, and one of these is a CLIP model.
    """
    given = _given(options)
    if not any(map(is_clip, checkpoints)):
        for name, value in given.items():
            rule = "none of the checkpoints is a CLIP model"
            raise refusal(name, value, rule, "Leave it out")
        return
    for name in _OF_CLASSES:
        if name in given and "label_column" not in given:
            raise refusal(name, given[name], "has no effect", "Set --label_column too")
    for name in ("tokenizer", "gguf_file"):
        if (value := getattr(options, name)) is not None:
            rule = "CLIP models have their own beside their weights"
            raise refusal(name, value, rule, "Leave it out")
    _evaluation(given)
    needs("nso robustness of a CLIP model", "clip", *_PACKAGES)


def load_clip_model(checkpoint: str) -> "ClipModel":
    """
    Raises:
        ValueError: no model or no weights can be read.
    """
    checkpoint = in_package(checkpoint, "checkpoint")
    if is_of_open_clip(checkpoint):
        from nso_hf.tasks.clip.models import load_clip

        return load_clip(name_of(checkpoint))
    from nso_hf.tasks.clip.of_transformers import load_clip_of_transformers

    return load_clip_of_transformers(checkpoint)


def measurable(
    model: nn.Module, checkpoint: str, options: Namespace, num_batches: int
) -> tuple[nn.Module, list[Batch]]:
    """A CLIP model with a loss and logits, and batches for it.

    Args:
        checkpoint: whose tokenizer and transform of images it takes.
    """
    from nso_hf.tasks.clip.labelled import Labelled
    from nso_hf.tasks.clip.matching import matching, zero_shot_classification

    given, clip = _given(options), replace(load_clip_model(checkpoint), model=model)
    columns = {name: it for name, it in given.items() if name not in _OF_CLASSES}
    data = DataOptions(train_data=options.data, zero_shot_split=options.split, **columns)
    amount = {"number": num_batches * options.batch_size, "size": options.batch_size}
    if options.label_column is None:
        pairs = data.open(options.data, options.split, labels=False)
        return matching(clip, pairs, **amount)
    evaluation = _evaluation(given)
    labelled = Labelled.open(data, evaluation, options.data)
    return zero_shot_classification(clip, labelled, evaluation.prompts, **amount)


def _given(options: Namespace) -> dict[str, Any]:
    return {name: it for name in OPTIONS if (it := getattr(options, name)) is not None}


def _evaluation(given: dict[str, Any]) -> EvaluationOptions:
    return EvaluationOptions(**{name: given[name] for name in _OF_CLASSES if name in given})
