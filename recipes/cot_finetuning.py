r"""Fine-tune a language model on chains of thought with Noise Stability Optimization.

    python recipes/cot_finetuning.py --config recipes/configs/demo.yaml
    python recipes/cot_finetuning.py --model_name_or_path gpt2 --dataset gsm8k \
        --output_dir runs/gsm8k --sigma 0.01 --lora_r 16 --learning_rate 3e-4

The model learns to answer a question with a rationale, then "-->", then the answer. Loss on the
completion only. It is evaluated by generation: on validation questions during training (these
choose the best checkpoint), and on test questions before training and once at its end. Everything
of `TrainingArguments` is an option too.
"""

import copy
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, TrainerCallback, set_seed

from nso_hf import NSOArguments, NSOConfig, NSOTrainer
from nso_hf.curvature import CurvatureCallback
from nso_hf.refusal import needs, refusal
from nso_hf.running.checkpoints import checkpoint_to_resume, last_complete_checkpoint, resumable
from nso_hf.running.command_line import RecipeParser
from nso_hf.running.program import run
from nso_hf.running.readiness import check_ready
from nso_hf.running.recorded_options import RecordedOptions, fingerprint
from nso_hf.running.tables import is_table
from nso_hf.tasks.reasoning.evaluation import METRICS, Evaluation, evaluate_answers
from nso_hf.tasks.reasoning.examples import (
    PRESETS,
    Columns,
    Example,
    hold_out,
    load_examples,
    without_questions_of,
)
from nso_hf.tasks.reasoning.generated import generate_examples
from nso_hf.tasks.reasoning.models import ModelOptions, check_lengths, load_model, with_lora
from nso_hf.tasks.reasoning.prompts import PromptFormat, training_rows
from nso_hf.tasks.reasoning.report import PACKAGES, report


@dataclass
class DataOptions:
    _argument_group_name = "data"
    _may_change = ("evaluate_before",)  # when a run goes on

    dataset: str = field(
        metadata={
            "help": f"One of {', '.join(p for p in PRESETS if p != 'columns')}; reasoning_gym:TASK "
            "(generated); a hub id; "
            "or a local .csv, .tsv, .json, .jsonl or .parquet file, a folder of such files named "
            "train, validation, test, or a copy of a data set of the hub."
        }
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "How the rows are read. Default: that of the same name, else 'columns'.",
            "choices": list(PRESETS),
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration on the hub, or in a copy of it."}
    )
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of a reasoning_gym task, as JSON."}
    )
    question_column: str = field(default="question", metadata={"help": "Column of the question."})
    rationale_column: str = field(
        default="rationale", metadata={"help": "Column of the rationale, or of a list of several."}
    )
    answer_column: str = field(default="answer", metadata={"help": "Column of the answer."})
    train_size: int | None = field(
        default=None,
        metadata={
            "help": "Use so many training questions. Default: all; 1000 where they are generated."
        },
    )
    validation_size: int = field(
        default=200,
        metadata={
            "help": "Validation questions, held out from training where there is no such split."
        },
    )
    test_size: int | None = field(
        default=None,
        metadata={"help": "Test questions. Default: all; 200 where held out or generated."},
    )
    format: str = field(
        default="rationale",
        metadata={
            "help": "Train on the rationale and the answer, or on the answer alone.",
            "choices": ["rationale", "answer"],
        },
    )
    template: str = field(
        default="auto",
        metadata={
            "help": "'plain': 'QUESTION ###' -> ' RATIONALE --> ANSWER'. 'chat': the model's chat "
            "template. "
            "'auto': chat where the model has one.",
            "choices": ["auto", "plain", "chat"],
        },
    )
    instruction: str = field(
        default="Think step by step, then write --> and the final answer.",
        metadata={"help": "Follows the question in chat templates."},
    )
    max_length: int = field(
        default=512, metadata={"help": "Leave out training texts of more tokens than this."}
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "Tokens that an answer may take in evaluation."}
    )
    evaluate_before: bool = field(
        default=True, metadata={"help": "Answer the test questions before training too."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset_kwargs, str):
            try:
                self.dataset_kwargs = json.loads(self.dataset_kwargs)
            except json.JSONDecodeError as error:
                cure = """Write it as '{"min_terms": 3}'"""
                raise refusal(
                    "dataset_kwargs", self.dataset_kwargs, f"not JSON ({error})", cure
                ) from error
        if self.dataset_kwargs and self.task is None:
            cure = "Remove it, or use --dataset reasoning_gym:TASK"
            raise refusal(
                "dataset_kwargs", self.dataset_kwargs, "only read by reasoning_gym tasks", cure
            )
        if self.preset is None:
            self.preset = self.dataset if self.dataset in PRESETS else "columns"
        for option, choices in [
            ("preset", list(PRESETS)),
            ("format", ["rationale", "answer"]),
            ("template", ["auto", "plain", "chat"]),
        ]:
            if getattr(self, option) not in choices:
                raise refusal(option, getattr(self, option), "unknown", f"Use {', '.join(choices)}")
        for option in (
            "train_size",
            "validation_size",
            "test_size",
            "max_length",
            "max_new_tokens",
        ):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise refusal(option, value, "must be at least 1", "Give a positive number")
        looks_local = is_table(self.dataset) or self.dataset.startswith((".", "/"))
        if looks_local and not Path(self.dataset).exists():
            raise refusal("dataset", self.dataset, "no such file or folder", "Check the path")

    @property
    def task(self) -> str | None:
        """The reasoning-gym task, where the data are generated."""
        prefix, colon, task = self.dataset.partition(":")
        return task if colon and prefix == "reasoning_gym" else None

    def load(self, seed: int) -> tuple[list[Example], list[Example], list[Example]]:
        """Training, validation and test examples; no question is in two of them."""
        if self.task is not None:
            return self._generate(self.task, seed)
        preset = PRESETS[str(self.preset)]
        path = preset.path if self.dataset == self.preset and preset.path else self.dataset
        options: dict[str, Any] = {
            "preset": self.preset,
            "config": self.dataset_config,
            "columns": Columns(self.question_column, self.rationale_column, self.answer_column),
        }
        train = load_examples(path, "train", **options)
        if train is None:
            raise refusal("dataset", path, "has no split 'train'", "Name the file train.jsonl")
        test = load_examples(path, preset.test_split, **options)
        if test is None:
            train, test = hold_out(train, self.test_size or 200, seed)
        if self.test_size is not None:
            _, test = hold_out(test, self.test_size, seed)
        train = without_questions_of(train, test)  # before validation is held out of it
        validation = None
        if preset.test_split != "validation":
            validation = load_examples(path, "validation", **options)
        if validation is None:
            train, validation = hold_out(train, self.validation_size, seed)
        validation = without_questions_of(validation, test)
        _, validation = hold_out(validation, self.validation_size, seed)
        train = without_questions_of(train, validation)
        if self.train_size is not None:
            _, train = hold_out(train, self.train_size, seed)
        return train, validation, test

    def _generate(self, task: str, seed: int) -> tuple[list[Example], list[Example], list[Example]]:
        kwargs = self.dataset_kwargs if isinstance(self.dataset_kwargs, dict) else {}
        sizes = (self.test_size or 200, self.validation_size, self.train_size or 1000)
        splits: list[list[Example]] = []
        for number, size in enumerate(sizes):
            # Item i of a task is a function of its seed + i: the splits are far apart.
            examples = generate_examples(task, size, 10_000_000 * (3 * seed + number), **kwargs)
            splits.append(without_questions_of(examples, [e for split in splits for e in split]))
        test, validation, train = splits
        return train, validation, test


@dataclass
class CurvatureOptions:
    _argument_group_name = "curvature"
    _may_change = (
        "curvature",
        "curvature_examples",
        "curvature_samples",
        "curvature_steps",
        "compare_plain",
    )

    curvature: bool = field(
        default=False,
        metadata={
            "help": "Measure the trace and the largest eigenvalue of the Hessian of the training "
            "loss, by the trained weights, after training; log them as curvature/*."
        },
    )
    curvature_examples: int = field(
        default=16,
        metadata={"help": "Training texts it is measured on, in batches as in training."},
    )
    curvature_samples: int = field(
        default=20,
        metadata={"help": "Products with the Hessian for the trace; more make its error smaller."},
    )
    curvature_steps: int | None = field(
        default=None,
        metadata={"help": "Measure it before training too, and after each so many steps."},
    )
    compare_plain: bool = field(
        default=False,
        metadata={
            "help": "Train plainly (sigma 0) too, from the same start with the same data and "
            "steps, in OUTPUT_DIR/plain, and show both."
        },
    )

    def __post_init__(self) -> None:
        for option in ("curvature_examples", "curvature_samples", "curvature_steps"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise refusal(option, value, "must be at least 1", "Give a positive number")

    def callback(self, trainer: NSOTrainer, rows: list[dict[str, list[int]]]) -> CurvatureCallback:
        """What measures it on the first of these rows."""
        size = trainer.args.per_device_train_batch_size
        starts = range(0, min(self.curvature_examples, len(rows)), size)
        batches = [
            dict(trainer.data_collator(rows[start : min(start + size, self.curvature_examples)]))
            for start in starts
        ]
        return CurvatureCallback(
            trainer,
            batches,
            at_start=self.curvature_steps is not None,
            every_steps=self.curvature_steps,
            num_samples=self.curvature_samples,
            tolerance=1e-2,
        )


class AtTheBeginning(TrainerCallback):
    """Calls a function when the model has been prepared for training."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.function()


class ReasoningTrainer(NSOTrainer):
    """`NSOTrainer` whose evaluation also has the validation questions answered."""

    answer: Any  # the function that answers them, set by the recipe

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        kwargs["metric_key_prefix"] = metric_key_prefix
        output = super().evaluation_loop(*args, **kwargs)
        answered = self.answer().metrics if metric_key_prefix == "eval" else {}
        for name, value in answered.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value  # type: ignore[index]
        return output


OPTIONS = [ModelOptions, DataOptions, CurvatureOptions, NSOConfig]


def summary(evaluation: Evaluation) -> dict[str, float]:
    """The shares and the counts they stand for."""
    counts = {"correct": evaluation.count("correct"), "questions": len(evaluation.predictions)}
    return counts | evaluation.metrics


def counted(
    data: DataOptions,
    train: list[Example],
    validation: list[Example],
    test: list[Example],
    texts: int,
    too_long: int,
) -> str:
    """How many texts and questions there are, and why there are fewer than asked for."""
    splits = (train, validation, test)
    questions = [len({example.question for example in split}) for split in splits]
    text = f"{texts} training texts of {questions[0]} questions"
    if too_long:
        text += f" ({too_long} longer than {data.max_length} tokens left out)"
    wanted = (data.train_size or (1000 if data.task else 0), data.validation_size, data.test_size)
    text += f", {questions[1]} validation and {questions[2]} test questions"
    fewer = [
        f"{there} of {size} {name}"
        for name, there, size in zip(
            ("training", "validation", "test"), questions, wanted, strict=True
        )
        if size and there < size
    ]
    if fewer:
        text += f"\n{', '.join(fewer)} questions: the rest occur twice, or there are no more"
    return text


def plainly(args: NSOConfig) -> NSOConfig:
    """The same training at sigma 0 in a folder of its own; where the other goes on, so does it."""
    plain = copy.copy(args)
    plain.method, plain.method_kwargs = "nso", None
    plain.sigma, plain.log_sharpness = 0.0, False
    output = Path(str(args.output_dir)) / "plain"
    last = last_complete_checkpoint(output, args.world_size)
    resumes = args.resume_from_checkpoint is not None and last is not None
    plain.output_dir, plain.resume_from_checkpoint = str(output), str(last) if resumes else None
    return plain


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(OPTIONS, description=__doc__.split("\n")[0])
    model_options, data, curvature, args = parser.parse(argv)
    needs("cot_finetuning.py", "recipes", *PACKAGES)
    check_ready(args, ["loss", *METRICS])
    if curvature.compare_plain and args.sigma == 0:
        cure = "Raise --sigma, or leave it out"
        raise refusal("compare_plain", True, "at sigma 0 both would be plain training", cure)
    results = fine_tune(model_options, data, curvature, args, args)
    if curvature.compare_plain:
        gc.collect()  # the first model, before the second is loaded
        if args.process_index == 0:
            print("Plain training, for comparison, from the same start.", flush=True)
        once = replace(data, evaluate_before=False), replace(curvature, curvature_steps=None)
        results["plain"] = fine_tune(model_options, *once, plainly(args), args)
    if args.process_index == 0:
        report(results, Path(str(args.output_dir)))


def fine_tune(
    model_options: ModelOptions,
    data: DataOptions,
    curvature: CurvatureOptions,
    args: NSOConfig,
    asked: NSOConfig,
) -> dict[str, Any]:
    """Train, evaluate, write the model and the predictions; return what goes into results.json.

    `asked` are the training options of the command, which `args` are made from.
    """
    checkpoint = checkpoint_to_resume(args)
    recorded = RecordedOptions(args, model_options, data, curvature, checkpoint=checkpoint)
    started = time.monotonic()
    set_seed(args.seed)
    with args.main_process_first():
        train, validation, test = data.load(args.seed)
    for split, examples in {"training": train, "validation": validation, "test": test}.items():
        recorded.check("dataset", data.dataset, f"{split} examples", fingerprint(examples))
    if not (train and validation and test):
        counts = (
            f"{len(train)} training, {len(validation)} validation and {len(test)} test questions"
        )
        raise refusal(
            "dataset", data.dataset, f"leaves {counts}", "Lower --validation_size or --test_size"
        )
    if data.format == "rationale" and not all(example.rationales for example in train):
        without = sum(not example.rationales for example in train)
        rule = f"{without} of {len(train)} training questions have no rationale"
        raise refusal("format", data.format, rule, "Set --rationale_column, or --format answer")
    model, tokenizer, is_encoder_decoder = load_model(model_options)
    if data.template == "chat" and tokenizer.chat_template is None:
        cure = "Use --template plain"
        raise refusal("template", "chat", "the tokenizer has no chat template", cure)
    prompt_format = PromptFormat(
        tokenizer,
        with_rationale=data.format == "rationale",
        chat=data.template == "chat" or (data.template == "auto" and bool(tokenizer.chat_template)),
        instruction=data.instruction,
        is_encoder_decoder=is_encoder_decoder,
        first_token=model.generation_config.forced_bos_token_id if is_encoder_decoder else None,
    )
    rows, too_long = training_rows(train, prompt_format, data.max_length)
    validation_rows, _ = training_rows(validation, prompt_format, data.max_length)
    if not rows or not validation_rows:
        rule = f"all {len(train)} training texts or {len(validation)} validation texts are longer"
        raise refusal("max_length", data.max_length, rule, "Raise it")
    name = model_options.model_name_or_path
    recorded.check("model_name_or_path", name, "tokens of the training texts", fingerprint(rows))
    weights = fingerprint((n, p.flatten()[:8].tolist()) for n, p in model.named_parameters())
    recorded.check("model_name_or_path", name, "weights", weights)
    if model_options.lora_r is not None:
        model = with_lora(model, model_options, is_encoder_decoder)

    prompts = [prompt_format.prompt_ids(example.question) for example in [*validation, *test]]
    longest_row = max(
        len(row[name]) for row in [*rows, *validation_rows] for name in ("input_ids", "labels")
    )
    limits = data.max_length, data.max_new_tokens
    check_lengths(model, *limits, longest_row, max(map(len, prompts)))

    trainer = ReasoningTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=-100),
    )

    def answer(examples: list[Example], description: str) -> Evaluation:
        return evaluate_answers(
            trainer.model,  # type: ignore[arg-type]
            prompt_format,
            examples,
            trainer.accelerator,
            batch_size=args.per_device_eval_batch_size,
            max_new_tokens=data.max_new_tokens,
            description=description,
        )

    trainer.answer = lambda: answer(validation, "Validation")
    output = Path(str(args.output_dir))
    if trainer.is_world_process_zero():
        print(counted(data, train, validation, test, len(rows), too_long))
        print(f"prompt: {prompt_format.prompt(train[0].question)!r}")
        print(f"completion: {prompt_format.completions(train[0])[0]!r}", flush=True)
    before_file = output / "before.json"  # read by a resumed run, whose model has changed since
    before = json.loads(before_file.read_text()) if checkpoint and before_file.exists() else None
    answering_seconds = 0.0

    def answer_before() -> None:  # once the model is where, and sharded as, the back end wants it
        nonlocal before, answering_seconds
        began = time.monotonic()
        answers_before = answer(test, "Test, before training")
        before = summary(answers_before)
        if trainer.is_world_process_zero():
            answers_before.write(output / "predictions_before.jsonl")
            before_file.write_text(json.dumps(before, indent=2))
        answering_seconds = time.monotonic() - began

    name = trainer.nso_backend.name
    recorded.check("backend", name, "back end", name)
    trainer.add_callback(recorded)
    if data.evaluate_before and not checkpoint:
        trainer.add_callback(AtTheBeginning(answer_before))
    if curvature.curvature:
        trainer.add_callback(curvature.callback(trainer, rows))
    train_started = time.monotonic()
    with resumable(asked, lambda: trainer.state):
        trainer.train(resume_from_checkpoint=checkpoint)
        train_seconds = time.monotonic() - train_started - answering_seconds
        trainer.save_model()
        answers = answer(test, "Test, after training")
    measured = [entry for entry in trainer.state.log_history if "curvature/trace" in entry]
    train_seconds -= sum(entry["curvature/seconds"] for entry in measured)
    after = summary(answers)
    if trainer.is_world_process_zero():
        answers.write(output / "predictions.jsonl")
    return {
        "before": before,
        "after": after,
        "steps": trainer.state.global_step,
        "curvature": measured[-1] if measured else None,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "best_validation_metric": trainer.state.best_metric,
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        "texts": len(rows),
        "texts_too_long": too_long,
        "backend": trainer.nso_backend.name,
        "processes": trainer.nso_backend.num_processes,
        "model_options": asdict(model_options),
        "data_options": asdict(data),
        "curvature_options": asdict(curvature),
        "nso_options": {option.name: getattr(args, option.name) for option in fields(NSOArguments)},
        "options": recorded.history,
        "log": trainer.state.log_history,
    }


if __name__ == "__main__":
    run(main)
