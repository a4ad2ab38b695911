r"""Pretrain a model of open_clip on image-caption pairs with Noise Stability Optimization.

    python recipes/clip_pretraining.py --config recipes/configs/demo_clip.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/clip_pretraining.py \
        --config recipes/configs/cc3m.yaml --train_data 'cc3m/{00000..00331}.tar' \
        --output_dir runs/cc3m

The loss is that of the global batch: the pairs of all processes and accumulated micro-batches. The
model is evaluated by retrieval among held-out pairs (with --eval_strategy during training too) and,
after training, by zero-shot classification and a linear probe. The output folder is one that
open_clip loads. Everything of `TrainingArguments` is an option too.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import IntervalStrategy, set_seed

from nso_hf.companions.options import CompanionOptions
from nso_hf.refusal import Refusal, needs, refusal
from nso_hf.robustness.options import RobustnessOptions
from nso_hf.running.checkpoints import checkpoint_to_resume, resumable
from nso_hf.running.command_line import RecipeParser
from nso_hf.running.program import run
from nso_hf.running.readiness import check_ready
from nso_hf.running.recorded_options import RecordedOptions, fingerprint
from nso_hf.running.results import Results, trained
from nso_hf.tasks.clip.arguments import CLIPConfig
from nso_hf.tasks.clip.fine_tuning import FineTuningOptions
from nso_hf.tasks.clip.options import DataOptions, EvaluationOptions, ModelOptions

if TYPE_CHECKING:
    from nso_hf.tasks.clip.encoding import Encoded
    from nso_hf.tasks.clip.labelled import Labelled
    from nso_hf.tasks.clip.matching import Measurable
    from nso_hf.tasks.clip.models import ClipModel
    from nso_hf.tasks.clip.pairs import Pairs

CONFIGS = Path(__file__).with_name("configs")
OPTIONS = [
    ModelOptions,
    DataOptions,
    EvaluationOptions,
    FineTuningOptions,
    RobustnessOptions,
    CompanionOptions,
    CLIPConfig,
]
PACKAGES = ("open_clip", "webdataset", "datasets", "sklearn", "matplotlib", "rich")


@contextmanager
def named(option: str) -> Iterator[None]:
    """Errors in the data name the option that they came from."""
    try:
        yield
    except Refusal as error:
        raise Refusal(re.sub(r"^(data|labels)=", f"{option}=", str(error))) from error


@dataclass(frozen=True)
class Collections:
    """What is trained on and what is evaluated on."""

    train: "Pairs"
    held_out: "Pairs | None"
    labelled: "Labelled | None"
    also: "dict[str, Labelled]"
    """Of other images, by name."""

    @property
    def by_name(self) -> "dict[str, Pairs]":
        named = {
            "training pairs, over all passes": self.train,
            "held-out pairs": self.held_out,
            "images with classes": self.labelled.pairs if self.labelled else None,
        } | {f"images of {name}": labelled.pairs for name, labelled in self.also.items()}
        return {name: pairs for name, pairs in named.items() if pairs is not None}


def open_collections(
    data: DataOptions,
    evaluation: EvaluationOptions,
    fine_tuning: FineTuningOptions,
    recorded: RecordedOptions,
) -> Collections:
    """Open what the options name; refuse what cannot be trained on, or evaluated on."""
    from nso_hf.tasks.clip.classification import check_probe
    from nso_hf.tasks.clip.labelled import Labelled
    from nso_hf.tasks.clip.stream import check_usable

    held_out = labelled = None
    also = {}
    with named("train_data"):
        train = data.open(data.train_data, data.train_split, data.train_num_pairs, labels=False)
        check_usable(train)
    recorded.check("train_data", data.train_data, "training pairs", train.digest())
    if data.eval_data is not None:
        with named("eval_data"):
            held_out = data.open(data.eval_data, data.eval_split, labels=False)
            check_usable(held_out)
        recorded.check("eval_data", data.eval_data, "held-out pairs", held_out.digest())
    if data.zero_shot_data is not None and evaluation.test:
        with named("zero_shot_data"):
            labelled = Labelled.open(data, evaluation, data.zero_shot_data)
            if evaluation.linear_probe:
                check_probe(labelled.pairs.labels())
    for name, source in fine_tuning.also.items() if evaluation.test else ():
        with named("eval_also"):
            also[name] = Labelled.open(data, evaluation, source)
    return Collections(train, held_out, labelled, also)


def load_model(options: ModelOptions, data: DataOptions, recorded: RecordedOptions) -> "ClipModel":
    """The model; refused where it is not the one that the run began with."""
    clip = options.load(data.augmentation if isinstance(data.augmentation, dict) else None)
    clip.check_tokens()
    weights = [(n, p.shape, p.flatten()[:8].tolist()) for n, p in clip.model.named_parameters()]
    tokens = clip.tokenizer(["A photo of 2 cats."]).tolist()
    facts: dict[str, list[Any]] = {
        "architecture": [clip.config],
        "weights": weights,
        "tokenizer": tokens,
    }
    for what, items in facts.items():
        recorded.check("model", options.model, what, fingerprint(items))
    return clip


def evaluated_on(
    collections: Collections,
    clip: "ClipModel",
    evaluation: EvaluationOptions,
    robustness: RobustnessOptions,
    args: CLIPConfig,
) -> "Measurable":
    """The model as a classifier of the images with classes, or among held-out pairs."""
    from nso_hf.tasks.clip.matching import matching, zero_shot_classification

    labelled, held_out = collections.labelled, collections.held_out
    number, size = robustness.robustness_examples, args.per_device_eval_batch_size
    if labelled is not None:
        prompts = evaluation.prompts
        return zero_shot_classification(clip, labelled, prompts, number=number, size=size)
    assert held_out is not None
    return matching(clip, held_out, number=number, size=size)


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(OPTIONS, description=__doc__.split("\n")[0], configs=CONFIGS)
    options = parser.parse(argv)
    needs("clip_pretraining.py", "clip", *PACKAGES)
    pretrain(*options)


def pretrain(
    model_options: ModelOptions,
    data: DataOptions,
    evaluation: EvaluationOptions,
    fine_tuning: FineTuningOptions,
    robustness: RobustnessOptions,
    companions: CompanionOptions,
    args: CLIPConfig,
) -> None:
    """From data to results, for options that were read without these packages."""
    from nso_hf.tasks.clip import measures
    from nso_hf.tasks.clip.report import report
    from nso_hf.tasks.clip.retrieval import METRICS
    from nso_hf.tasks.clip.stream import PairStream
    from nso_hf.tasks.clip.trainer import CLIPTrainer
    from nso_hf.tasks.clip.wise_ft import FirstWeights

    check_ready(args, ["loss", *METRICS])
    companions.check(args)
    fine_tuning.check(model_options, data, evaluation)
    checkpoint = checkpoint_to_resume(args)
    groups = (model_options, data, evaluation, fine_tuning, robustness, companions)
    recorded = RecordedOptions(args, *groups, checkpoint=checkpoint)
    results = Results(
        args,
        recorded,
        model_options=model_options,
        data_options=data,
        evaluation_options=evaluation,
        fine_tuning_options=fine_tuning,
        companion_options=companions,
    )
    set_seed(args.seed)
    if args.eval_strategy != "no" and data.eval_data is None:
        value = IntervalStrategy(args.eval_strategy).value
        raise refusal("eval_strategy", value, "nothing to evaluate on", "Set --eval_data")
    if robustness.robustness and not (data.eval_data or (data.zero_shot_data and evaluation.test)):
        cure = "Set --eval_data, or --zero_shot_data with --test true"
        raise refusal("robustness", True, "nothing to evaluate on", cure)
    if evaluation.linear_probe and data.zero_shot_data is None:
        raise refusal("linear_probe", True, "needs images with classes", "Set --zero_shot_data")
    with args.main_process_first():
        collections = open_collections(data, evaluation, fine_tuning, recorded)
    train, held_out, labelled = collections.train, collections.held_out, collections.labelled
    size = args.per_device_train_batch_size
    if evaluation.curvature and evaluation.curvature_batches > len(train) // size:
        rule = f"{len(train)} training pairs make {len(train) // size} batches of {size}"
        raise refusal("curvature_batches", evaluation.curvature_batches, rule, "Lower it")
    clip = load_model(model_options, data, recorded)
    first = FirstWeights(clip.model) if collections.also else None
    stream = PairStream(
        train,
        clip.train_transform,
        clip.tokenizer,
        batch_size=size,
        micro_batches=args.gradient_accumulation_steps,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        process=args.process_index,
        processes=args.world_size,
    )
    trainer = CLIPTrainer(clip, args, train_dataset=stream, eval_dataset=held_out)
    for callback in companions.callbacks():
        trainer.add_callback(callback)
    robustness.check(trainer.nso_backend)
    is_first, output = trainer.is_world_process_zero(), Path(str(args.output_dir))
    if is_first:
        parameters = sum(p.numel() for p in clip.model.parameters())
        print(
            f"{type(clip.model).__name__} {model_options.model}, "
            f"{parameters / 1e6:.1f}M parameters; {len(train)} training pairs, "
            f"global batch {size * args.world_size * args.gradient_accumulation_steps}; "
            f"{len(held_out) if held_out else 0} held-out pairs, "
            f"{len(labelled.names) if labelled else 0} classes",
            flush=True,
        )
    encoded: Encoded | None = None
    with resumable(args, lambda: trainer.state):
        results.add(**trained(trainer, recorded, checkpoint), training_pairs=len(train))
        trainer.save_model()
        if held_out is not None:
            encoded = trainer.encode(held_out)
            results.add(**measures.found_among(trainer, encoded))
        if labelled is not None:
            for figures in measures.classified(trainer, labelled, evaluation):
                results.add(**figures)
        if first is not None:
            alphas = fine_tuning.wise_ft or []
            for figures in measures.kept(
                trainer, collections.also, labelled, first, evaluation, alphas
            ):
                results.add(**figures)
        if robustness.robustness:
            model, batches = evaluated_on(collections, clip, evaluation, robustness, args)
            results.add(robustness=robustness.rows(model, batches))
        if evaluation.curvature:
            results.add(curvature=measures.curvature(trainer, train, evaluation))
    counts = gather_object([{n: p.skipped.counts for n, p in collections.by_name.items()}])
    skipped = {
        name: dict(sum((Counter(count[name]) for count in counts), Counter())) for name in counts[0]
    }
    results.add(skipped=skipped)
    if is_first:
        report(results, output, encoded, held_out)


if __name__ == "__main__":
    run(main)
