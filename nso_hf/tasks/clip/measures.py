"""What results.json has on a trained model: retrieval, classification, what is kept, curvature."""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from nso_hf.curvature import hessian_eigenvalues, hessian_trace
from nso_hf.running.paired import Measured, before_and_after
from nso_hf.tasks.clip.classification import linear_probe, zero_shot
from nso_hf.tasks.clip.encoding import Encoded
from nso_hf.tasks.clip.labelled import Labelled
from nso_hf.tasks.clip.options import EvaluationOptions
from nso_hf.tasks.clip.pairs import Pairs
from nso_hf.tasks.clip.retrieval import retrieval
from nso_hf.tasks.clip.stream import PairStream
from nso_hf.tasks.clip.trainer import CLIPTrainer
from nso_hf.tasks.clip.wise_ft import FirstWeights
from nso_hf.tasks.images.classification import Classification


def found_among(trainer: CLIPTrainer, encoded: Encoded) -> dict[str, Any]:
    """On the retrieval of held-out pairs."""
    found = retrieval(encoded, trainer.args.device)
    texts, images = found.candidates
    counts = {"images": images, "texts": texts}
    figures = counts | {"metrics": found.metrics, "chance": found.chance}
    return {"validation_loss": encoded.loss, "retrieval": figures}


def classified(
    trainer: CLIPTrainer, labelled: Labelled, options: EvaluationOptions
) -> Iterator[dict[str, Any]]:
    """On classification, one way after another."""
    accuracy, _, encoded = _zero_shot(trainer, labelled, options)
    yield {"zero_shot": asdict(accuracy)}
    if options.linear_probe:
        yield {"linear_probe": asdict(linear_probe(encoded, labelled.classes))}


def kept(
    trainer: CLIPTrainer,
    also: Mapping[str, Labelled],
    task: Labelled | None,
    first: FirstWeights,
    options: EvaluationOptions,
    alphas: list[float],
) -> Iterator[dict[str, Any]]:
    """On other images than those of the task: with the first weights and those now, and of all by
    the weights between."""
    at: dict[tuple[str, float], Measured] = {}

    def measured(name: str, labelled: Labelled, alpha: float) -> Measured:
        if (name, alpha) not in at:
            with first.interpolated(trainer, alpha):
                _, at[name, alpha], _ = _zero_shot(trainer, labelled, options)
        return at[name, alpha]

    before_after = {
        name: [measured(name, labelled, alpha) for alpha in (0, 1)]
        for name, labelled in also.items()
    }
    yield {
        "forgetting": {
            name: before_and_after("task", "accuracy", *both) for name, both in before_after.items()
        }
    }
    if alphas:
        assert task is not None
        yield {
            "wise_ft": [
                {
                    "alpha": alpha,
                    "zero_shot": measured("", task, alpha).summary("accuracy"),
                    "also": {
                        name: measured(name, labelled, alpha).summary("accuracy")
                        for name, labelled in also.items()
                    },
                }
                for alpha in alphas
            ]
        }


def _zero_shot(
    trainer: CLIPTrainer, labelled: Labelled, options: EvaluationOptions
) -> tuple[Classification, Measured, Encoded]:
    """The accuracy, of each image whether it is told right, and the features."""
    encoded = trainer.encode(labelled.pairs, needs="label")
    classes, names = list(labelled.names), list(labelled.names.values())
    model, prompts, device = trainer.module, options.prompts, trainer.args.device
    accuracy, predicted = zero_shot(
        model, trainer.clip, encoded, classes, prompts, names, device=device
    )
    number = {label: index for index, label in enumerate(classes)}
    right = [
        float(guess == number[str(label)])
        for guess, label in zip(predicted.tolist(), encoded.labels, strict=True)
    ]
    return accuracy, Measured(right, [1] * len(right)), encoded


def curvature(
    trainer: CLIPTrainer, train: Pairs, options: EvaluationOptions
) -> dict[str, dict[str, float]]:
    """Trace and largest eigenvalue of the loss, by all trained weights and by tower."""
    clip, size = trainer.clip, trainer.args.per_device_train_batch_size
    stream = iter(PairStream(train, clip.eval_transform, clip.tokenizer, batch_size=size))
    batches = []
    for _ in range(options.curvature_batches):
        examples = [next(stream) for _ in range(size)]
        batches.append(trainer.data_collator(examples))
    trained = [name for name, p in clip.model.named_parameters() if p.requires_grad]
    towers = {
        "all": trained,
        "image tower": [name for name in trained if name.startswith("visual.")],
        "text tower": [name for name in trained if not re.match(r"visual\.|logit_", name)],
    }
    measured = {}
    for tower, names in towers.items():
        if not names:
            continue
        params = [f"^{re.escape(name)}$" for name in names]
        began = time.monotonic()
        trace = hessian_trace(
            trainer, batches, num_samples=options.curvature_samples, params=params
        )
        top = hessian_eigenvalues(trainer, batches, tolerance=1e-2, params=params)
        measured[tower] = {
            "trace": trace.estimate,
            "trace_stderr": trace.stderr,
            "lambda_max": top.values[0],
            "lambda_max_residual": top.residuals[0],
            "seconds": round(time.monotonic() - began, 1),
        }
    return measured
