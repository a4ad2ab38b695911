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

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import set_seed

from nso_hf import NSOArguments
from nso_hf.checkpoints import checkpoint_to_resume, how_to_go_on
from nso_hf.clip.arguments import CLIPConfig
from nso_hf.clip.classification import (
    IMAGENET_NAMES,
    TEMPLATES,
    check_probe,
    class_names,
    linear_probe,
    zero_shot,
)
from nso_hf.clip.encoding import Encoded, encode
from nso_hf.clip.models import ClipModel, load_clip, lock
from nso_hf.clip.openmoji import openmoji_pairs
from nso_hf.clip.pairs import Fields, Pairs
from nso_hf.clip.report import plot_retrieval, print_results
from nso_hf.clip.retrieval import retrieval
from nso_hf.clip.sources import open_pairs
from nso_hf.clip.stream import PairStream, check_usable
from nso_hf.clip.trainer import CLIPTrainer
from nso_hf.command_line import RecipeParser, run
from nso_hf.curvature import hessian_eigenvalues, hessian_trace
from nso_hf.plots import plot_training
from nso_hf.refusal import Refusal, refusal

TITLES = {
    "loss": "Contrastive loss, nats",
    "eval_text_to_image_recall@10": "Validation recall@10, text → image",
    "clip/logit_scale": "Logit scale",
    "nso/perturbation_norm": "Norm of the perturbation applied",
}


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    model: str = field(
        metadata={
            "help": "Name of an open_clip model (ViT-S-16), the path of a JSON file that describes "
            "one, local-dir:FOLDER or hf-hub:ID."
        }
    )
    pretrained: str | None = field(
        default=None,
        metadata={"help": "open_clip's tag of weights, or a file. Default: random weights."},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels, other than the model's own."}
    )
    siglip: bool = field(
        default=False, metadata={"help": "Sigmoid loss (SigLIP) with a bias of the logits."}
    )
    patch_dropout: float | None = field(
        default=None, metadata={"help": "Share of image patches left out in training, in [0, 1)."}
    )
    lock_image: bool = field(default=False, metadata={"help": "Freeze the image tower."})
    lock_image_unlocked_groups: int = field(
        default=0, metadata={"help": "But for its last so many groups of layers."}
    )
    lock_image_freeze_bn_stats: bool = field(
        default=False, metadata={"help": "Freeze its batch-norm statistics too."}
    )
    lock_text: bool = field(default=False, metadata={"help": "Freeze the text tower."})
    lock_text_unlocked_layers: int = field(
        default=0, metadata={"help": "But for its last so many layers."}
    )

    def __post_init__(self) -> None:
        if self.patch_dropout is not None and not 0 <= self.patch_dropout < 1:
            raise refusal("patch_dropout", self.patch_dropout, "must be in [0, 1)", "Typical: 0.5")
        for option in ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats"):
            if getattr(self, option) and not self.lock_image:
                value = getattr(self, option)
                raise refusal(option, value, "has no effect", "Set --lock_image true too")
        if self.lock_text_unlocked_layers and not self.lock_text:
            value = self.lock_text_unlocked_layers
            cure = "Set --lock_text true too"
            raise refusal("lock_text_unlocked_layers", value, "has no effect", cure)

    def load(self, augmentation: dict[str, Any] | None) -> ClipModel:
        """The model, its towers locked as asked."""
        clip = load_clip(
            self.model,
            self.pretrained,
            image_size=self.image_size,
            patch_dropout=self.patch_dropout,
            siglip=self.siglip,
            augmentation=augmentation,
        )
        lock(
            clip.model,
            image=self.lock_image,
            unlocked_groups=self.lock_image_unlocked_groups,
            freeze_bn_stats=self.lock_image_freeze_bn_stats,
            text=self.lock_text,
            unlocked_layers=self.lock_text_unlocked_layers,
        )
        return clip


@dataclass
class DataOptions:
    _argument_group_name = "data"

    train_data: str = field(
        metadata={
            "help": "webdataset shards ('cc3m-{000..331}.tar', several joined by ::), a folder of "
            "them, a .csv or .tsv file, a folder of images, a hub id; or openmoji (carried by pip)."
        }
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Held-out pairs for validation loss and retrieval."}
    )
    zero_shot_data: str | None = field(
        default=None, metadata={"help": "Images with classes, for zero-shot classification."}
    )
    train_num_pairs: int | None = field(
        default=None,
        metadata={
            "help": "Pairs in the training shards. Default: sizes.json or __len__ beside them, or "
            "counted."
        },
    )
    image_column: str | None = field(
        default=None,
        metadata={
            "help": "Column, or suffix of the shards' files. Default: filepath in CSV files, image "
            "elsewhere; png, jpg, jpeg or webp in shards."
        },
    )
    caption_column: str | None = field(
        default=None,
        metadata={
            "help": "Column, suffix, or entry of the shards' json files. Default: title in CSV "
            "files, text elsewhere; txt in shards."
        },
    )
    label_column: str = field(
        default="label", metadata={"help": "The same, of the class in --zero_shot_data."}
    )
    csv_separator: str = field(default="\t", metadata={"help": "Between the columns of a .csv."})
    train_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
    eval_split: str = field(default="validation", metadata={"help": "Split of a hub dataset."})
    zero_shot_split: str = field(default="test", metadata={"help": "Split of a hub dataset."})
    augmentation: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": """Fields of open_clip.AugmentationCfg, as '{"scale": [0.5, 1.0]}'."""},
    )

    def __post_init__(self) -> None:
        if isinstance(self.augmentation, str):
            try:
                self.augmentation = json.loads(self.augmentation)
            except json.JSONDecodeError as error:
                cure = """Write it as '{"scale": [0.5, 1.0]}'"""
                rule = f"not JSON ({error})"
                raise refusal("augmentation", self.augmentation, rule, cure) from error
        if not isinstance(self.augmentation, (dict, type(None))):
            cure = """Write it as '{"scale": [0.5, 1.0]}'"""
            raise refusal("augmentation", self.augmentation, "not a mapping", cure)
        if self.train_num_pairs is not None and self.train_num_pairs < 1:
            value = self.train_num_pairs
            raise refusal("train_num_pairs", value, "must be at least 1", "Leave it out to count")

    def open(self, data: str, split: str, num_pairs: int | None = None, *, labels: bool) -> Pairs:
        """The pairs that one of the options names; with `labels`, each with its class."""
        if data == "openmoji":
            for option in ("image_column", "caption_column", "train_num_pairs"):
                if getattr(self, option) is not None:
                    value = getattr(self, option)
                    raise refusal(option, value, "openmoji has no columns", "Leave it out")
            return openmoji_pairs("train" if split == self.train_split else "test")
        label = self.label_column if labels else None
        return open_pairs(
            data,
            Fields(self.image_column, self.caption_column, label),
            split=split,
            csv_separator=self.csv_separator,
            num_pairs=num_pairs,
        )


@dataclass
class EvaluationOptions:
    _argument_group_name = "evaluation"

    templates: str = field(
        default="openai",
        metadata={
            "help": f"Prompts of a class: {', '.join(TEMPLATES)} (open_clip's 80 and 7; the name "
            "alone), or a text file with one prompt a line, {} standing for the name."
        },
    )
    class_names: str | None = field(
        default=None,
        metadata={
            "help": "JSON file, class -> name in prompts; or imagenet, for classes numbered 0 to "
            "999. Default: the classes themselves."
        },
    )
    linear_probe: bool = field(
        default=False,
        metadata={"help": "Fit logistic regression on the image features of --zero_shot_data."},
    )
    curvature: bool = field(
        default=False,
        metadata={
            "help": "Measure the trace and the largest eigenvalue of the Hessian of the training "
            "loss after training, by all trained weights and by those of each tower."
        },
    )
    curvature_batches: int = field(
        default=2,
        metadata={"help": "Training batches it is measured on, without augmentation."},
    )
    curvature_samples: int = field(
        default=20, metadata={"help": "Products with the Hessian for each trace."}
    )

    def __post_init__(self) -> None:
        if self.templates not in TEMPLATES and not Path(self.templates).is_file():
            cure = f"Use {', '.join(TEMPLATES)}, or the path of a text file"
            raise refusal("templates", self.templates, "unknown, and no such file", cure)
        if not self.prompts:
            raise refusal("templates", self.templates, "the file is empty", "Write 'a photo of {}'")
        for prompt in self.prompts:
            if isinstance(prompt, str) and not _takes_a_name(prompt):
                rule = f"the line {prompt!r} does not have one {{}} for the name"
                raise refusal("templates", self.templates, rule, "Write 'a photo of {}'")
        if self.class_names not in (None, "imagenet") and not Path(str(self.class_names)).is_file():
            cure = "Give a JSON file, or imagenet"
            raise refusal("class_names", self.class_names, "no such file", cure)
        for option in ("curvature_batches", "curvature_samples"):
            if getattr(self, option) < 1:
                value = getattr(self, option)
                raise refusal(option, value, "must be at least 1", "Give a positive number")

    @property
    def prompts(self) -> tuple[Any, ...]:
        """Functions or format strings, from a class's name to a prompt."""
        if self.templates in TEMPLATES:
            return tuple(TEMPLATES[self.templates])
        lines = Path(self.templates).read_text().splitlines()
        return tuple(line.strip() for line in lines if line.strip())

    def names(self, classes: list[str]) -> list[str]:
        """What the prompts call these classes."""
        if self.class_names is None:
            return classes
        if self.class_names == "imagenet":
            known = IMAGENET_NAMES
        else:
            try:
                known = json.loads(Path(self.class_names).read_text())
            except ValueError as error:
                cure = """Write it as '{"class": "name"}'"""
                rule = f"not JSON ({error})"
                raise refusal("class_names", self.class_names, rule, cure) from error
            if not isinstance(known, dict):
                cure = """Write it as '{"class": "name"}'"""
                raise refusal("class_names", self.class_names, "not a mapping", cure)
        missing = [label for label in classes if label not in known]
        if missing:
            rule = f"has no name for the classes {', '.join(missing[:5])}"
            raise refusal("class_names", self.class_names, rule, "Add them")
        return [known[label] for label in classes]


def _takes_a_name(prompt: str) -> bool:
    try:
        return prompt.format("name") != prompt
    except (KeyError, IndexError, ValueError):
        return False


OPTIONS = [ModelOptions, DataOptions, EvaluationOptions, CLIPConfig]


def measure_curvature(
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


@contextmanager
def named(option: str) -> Iterator[None]:
    """Errors in the data name the option that they came from."""
    try:
        yield
    except Refusal as error:
        raise Refusal(re.sub(r"^(data|labels)=", f"{option}=", str(error))) from error


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(OPTIONS, description=__doc__.split("\n")[0])
    model_options, data, evaluation, args = parser.parse(argv)
    checkpoint = checkpoint_to_resume(args)
    started = time.monotonic()
    set_seed(args.seed)
    if args.eval_strategy != "no" and data.eval_data is None:
        raise refusal(
            "eval_strategy", args.eval_strategy.value, "nothing to evaluate on", "Set --eval_data"
        )
    if evaluation.linear_probe and data.zero_shot_data is None:
        raise refusal("linear_probe", True, "needs images with classes", "Set --zero_shot_data")
    held_out = labelled = None
    classes: list[str] = []
    with args.main_process_first():
        with named("train_data"):
            train = data.open(data.train_data, data.train_split, data.train_num_pairs, labels=False)
            check_usable(train)
        if data.eval_data is not None:
            with named("eval_data"):
                held_out = data.open(data.eval_data, data.eval_split, labels=False)
                check_usable(held_out)
        if data.zero_shot_data is not None:
            with named("zero_shot_data"):
                labelled = data.open(data.zero_shot_data, data.zero_shot_split, labels=True)
                labels = labelled.labels()
                classes = class_names(labels, data.zero_shot_data)
                if evaluation.linear_probe:
                    check_probe(labels)
                check_usable(labelled, "label")
    batch = args.per_device_train_batch_size
    if evaluation.curvature and evaluation.curvature_batches > len(train) // batch:
        rule = f"{len(train)} training pairs make {len(train) // batch} batches of {batch}"
        raise refusal("curvature_batches", evaluation.curvature_batches, rule, "Lower it")
    names = evaluation.names(classes)
    clip = model_options.load(data.augmentation if isinstance(data.augmentation, dict) else None)
    clip.check_tokens()
    stream = PairStream(
        train,
        clip.train_transform,
        clip.tokenizer,
        batch_size=args.per_device_train_batch_size,
        micro_batches=args.gradient_accumulation_steps,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        process=args.process_index,
        processes=args.world_size,
    )
    trainer = CLIPTrainer(clip, args, train_dataset=stream, eval_dataset=held_out)
    is_first, output = trainer.is_world_process_zero(), Path(str(args.output_dir))
    if is_first:
        parameters = sum(p.numel() for p in clip.model.parameters())
        batch = (
            args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        )
        print(
            f"{type(clip.model).__name__} {model_options.model}, "
            f"{parameters / 1e6:.1f}M parameters; "
            f"{len(train)} training pairs, global batch {batch}; "
            f"{len(held_out) if held_out else 0} held-out pairs, {len(classes)} classes",
            flush=True,
        )
    results: dict[str, Any] = {
        "training_pairs": len(train),
        "model_options": asdict(model_options),
        "data_options": asdict(data),
        "evaluation_options": asdict(evaluation),
        "nso_options": {option.name: getattr(args, option.name) for option in fields(NSOArguments)},
    }

    def write() -> None:  # after each measurement, since the next one can fail
        results["total_seconds"] = round(time.monotonic() - started, 1)
        if is_first:
            (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    encoded: Encoded | None = None
    train_started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        results |= {
            "train_seconds": round(time.monotonic() - train_started, 1),
            "steps": trainer.state.global_step,
            "backend": trainer.nso_backend.name,
            "processes": trainer.nso_backend.num_processes,
            "log": trainer.state.log_history,
        }
        trainer.save_model()
        write()
        encoding: dict[str, Any] = {
            "batch_size": args.per_device_eval_batch_size,
            "workers": args.dataloader_num_workers,
        }
        if held_out is not None:
            loss = trainer.loss_of_batch
            encoded = encode(
                trainer.module, clip, held_out, trainer.accelerator, loss=loss, **encoding
            )
            found = retrieval(encoded, args.device)
            texts, images = found.candidates
            results["validation_loss"] = encoded.loss
            results["retrieval"] = {
                "images": images,
                "texts": texts,
                "metrics": found.metrics,
                "chance": found.chance,
            }
            write()
        if labelled is not None:
            with_class = encode(
                trainer.module, clip, labelled, trainer.accelerator, needs="label", **encoding
            )
            accuracy, _ = zero_shot(
                trainer.module,
                clip,
                with_class,
                classes,
                evaluation.prompts,
                names,
                device=args.device,
            )
            results["zero_shot"] = asdict(accuracy)
            write()
            if evaluation.linear_probe:
                results["linear_probe"] = asdict(linear_probe(with_class, classes))
        if evaluation.curvature:
            results["curvature"] = measure_curvature(trainer, train, evaluation)
    except KeyboardInterrupt:  # in the measurements too
        sys.exit(f"\n{how_to_go_on(args, trainer.state.global_step)}")
    opened = {"training pairs, over all passes": train, "held-out pairs": held_out}
    opened["images with classes"] = labelled
    counts = gather_object([{n: p.skipped.counts for n, p in opened.items() if p is not None}])
    results["skipped"] = {
        name: dict(sum((Counter(count[name]) for count in counts), Counter())) for name in counts[0]
    }
    write()
    if not is_first:
        return
    files = ["results.json", "training.png", "model.safetensors", "open_clip_config.json"]
    plot_training(trainer.state.log_history, output / "training.png", TITLES, top=None)
    if encoded is not None and held_out is not None:
        plot_retrieval(encoded, held_out, output / "retrieval.png")
        files.insert(2, "retrieval.png")
    print_results(results, output, files)


if __name__ == "__main__":
    run(main)
