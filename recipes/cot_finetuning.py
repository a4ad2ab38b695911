r"""Fine-tune a language model on chains of thought with Noise Stability Optimization.

    python recipes/cot_finetuning.py --config recipes/configs/demo.yaml
    python recipes/cot_finetuning.py --model_name_or_path gpt2 --dataset gsm8k \
        --output_dir runs/gsm8k --sigma 0.01 --lora_r 16 --learning_rate 3e-4

The model learns to answer a question with a rationale, then "-->", then the answer. Loss on the
completion only. It is evaluated by generation: on validation questions during training (these
choose the best checkpoint), and on test questions before training and once at its end, with what it
forgets of other tasks and texts, and what survives of it in few bits. Everything of
`TrainingArguments` is an option too.
"""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, set_seed

from nso_hf import NSOConfig
from nso_hf.companions.options import CompanionOptions
from nso_hf.refusal import Refusal, needs, refusal
from nso_hf.running.checkpoints import checkpoint_to_resume, resumable
from nso_hf.running.command_line import RecipeParser
from nso_hf.running.program import run
from nso_hf.running.readiness import check_ready
from nso_hf.running.recorded_options import RecordedOptions, fingerprint
from nso_hf.running.results import Results, trained
from nso_hf.tasks.measurements import MeasurementOptions, plainly
from nso_hf.tasks.reasoning.before_after import BeforeAndAfter
from nso_hf.tasks.reasoning.evaluation import METRICS
from nso_hf.tasks.reasoning.further import FurtherOptions, FurtherSet
from nso_hf.tasks.reasoning.models import ModelOptions, check_lengths, load_model, with_lora
from nso_hf.tasks.reasoning.options import DataOptions, Splits
from nso_hf.tasks.reasoning.prompts import PromptFormat, training_rows
from nso_hf.tasks.reasoning.report import PACKAGES, report
from nso_hf.tasks.reasoning.robustness import AnswerRobustnessOptions
from nso_hf.tasks.reasoning.trainer import ReasoningTrainer

Rows = list[dict[str, Any]]
CONFIGS = Path(__file__).with_name("configs")
OPTIONS = [
    ModelOptions,
    DataOptions,
    FurtherOptions,
    MeasurementOptions,
    AnswerRobustnessOptions,
    CompanionOptions,
    NSOConfig,
]


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(OPTIONS, description=__doc__.split("\n")[0], configs=CONFIGS)
    model_options, data, further, curvature, robustness, companions, args = parser.parse(argv)
    needs("cot_finetuning.py", "recipes", "peft", *PACKAGES)
    check_ready(args, ["loss", *METRICS])
    companions.check(args)
    curvature.check(args)
    groups = (model_options, data, further)
    results = fine_tune(*groups, curvature, robustness, companions, args, args)
    if curvature.compare_plain:
        gc.collect()  # the first model, before the second is loaded
        if args.process_index == 0:
            print("Plain training, for comparison, from the same start.", flush=True)
        once = replace(curvature, curvature_steps=None)
        results["plain"] = fine_tune(*groups, once, robustness, companions, plainly(args), args)
    if args.process_index == 0:
        report(results, Path(str(args.output_dir)))


def prepared(
    model_options: ModelOptions,
    data: DataOptions,
    further: FurtherOptions,
    robustness: AnswerRobustnessOptions,
    recorded: RecordedOptions,
    splits: Splits,
    seed: int,
) -> tuple[torch.nn.Module, PromptFormat, dict[str, Rows], int, list[FurtherSet]]:
    """The model, how it is asked, the rows of each split, how many for training were too long, and
    further data."""
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
    texts = {"training": splits.train, "validation": splits.validation}
    if robustness.robustness and data.test:
        texts["test"] = splits.test
    rows, too_long = {}, {}
    for split, examples in texts.items():
        rows[split], too_long[split] = training_rows(examples, prompt_format, data.max_length)
        if not rows[split]:
            raise no_rows(split, too_long[split], data)
    name, train = model_options.model_name_or_path, rows["training"]
    recorded.check("model_name_or_path", name, "tokens of the training texts", fingerprint(train))
    weights = fingerprint((n, p.flatten()[:8].tolist()) for n, p in model.named_parameters())
    recorded.check("model_name_or_path", name, "weights", weights)
    sets = further.load(
        prompt_format, [*splits.train, *splits.validation], data.columns, data.max_length, seed
    )
    for found in sets:
        fact = fingerprint([*found.examples, *found.texts])
        recorded.check(found.option, found.spec, f"data of {found.name!r}", fact)
    if model_options.lora_r is not None:
        collate = DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=-100)
        model = with_lora(model, model_options, is_encoder_decoder, dict(collate(train[:8])))
    asked = [*splits.validation, *splits.test, *(e for found in sets for e in found.examples)]
    prompts = [prompt_format.prompt_ids(example.question) for example in asked]
    longest_row = max(
        [len(row[n]) for of in rows.values() for row in of for n in ("input_ids", "labels")]
        + [len(ids) for found in sets for text in found.texts for ids, _ in text]
    )
    check_lengths(model, data.max_length, data.max_new_tokens, longest_row, max(map(len, prompts)))
    return model, prompt_format, rows, too_long["training"], sets


def no_rows(split: str, too_long: int, data: DataOptions) -> Refusal:
    """Why a split has none."""
    otherwise = ", or leave out --robustness" if split == "test" else ""
    if too_long:
        rule = f"all {too_long} {split} texts are longer"
        return refusal("max_length", data.max_length, rule, f"Raise it{otherwise}")
    cure = f"Set --rationale_column, or --format answer{otherwise}"
    return refusal("format", data.format, f"no {split} question has a rationale", cure)


def fine_tune(
    model_options: ModelOptions,
    data: DataOptions,
    further: FurtherOptions,
    curvature: MeasurementOptions,
    robustness: AnswerRobustnessOptions,
    companions: CompanionOptions,
    args: NSOConfig,
    asked: NSOConfig,
) -> Results:
    """Train, evaluate, write the model and the predictions; return what goes into results.json.

    `asked` are the training options of the command, which `args` are made from.
    """
    checkpoint = checkpoint_to_resume(args)
    groups = (model_options, data, further, curvature, robustness, companions)
    recorded = RecordedOptions(args, *groups, checkpoint=checkpoint)
    results = Results(
        args,
        recorded,
        model_options=model_options,
        data_options=data,
        further_options=further,
        curvature_options=curvature,
        robustness_options=robustness,
        companion_options=companions,
    )
    set_seed(args.seed)
    with args.main_process_first():
        splits = data.load(args.seed)
    for split, examples in zip(("training", "validation", "test"), splits, strict=True):
        recorded.check("dataset", data.dataset, f"{split} examples", fingerprint(examples))
    model, prompt_format, rows, too_long, sets = prepared(
        model_options, data, further, robustness, recorded, splits, args.seed
    )
    trainer = ReasoningTrainer(
        model=model,
        args=args,
        train_dataset=rows["training"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorForSeq2Seq(
            prompt_format.tokenizer, model, label_pad_token_id=-100
        ),
        callbacks=companions.callbacks(),
        prompt_format=prompt_format,
        validation=splits.validation,
        max_new_tokens=data.max_new_tokens,
    )
    robustness.check(trainer.nso_backend)
    if trainer.is_world_process_zero():
        print(data.described(splits, len(rows["training"]), too_long))
        print(f"prompt: {prompt_format.prompt(splits.train[0].question)!r}")
        print(f"completion: {prompt_format.completions(splits.train[0])[0]!r}", flush=True)
    test = splits.test if data.test else []
    measured = BeforeAndAfter(trainer, test, sets, tests_before=data.evaluate_before)
    if checkpoint or args is not asked:  # the model has changed since, or the first one began so
        measured.read(Path(str(asked.output_dir)))
    else:
        trainer.add_callback(measured)
    with resumable(asked, lambda: trainer.state):
        watched = curvature.callback(trainer, rows["training"])
        figures = trained(trainer, recorded, checkpoint, watched)
        figures["train_seconds"] = round(figures["train_seconds"] - measured.seconds, 2)
        results.add(texts=len(rows["training"]), texts_too_long=too_long, **figures)
        trainer.save_model()
        results.add(validation=trainer.validated(is_average=companions.apply_average))
        results.add(**measured.after())
        if test:
            for found in robustness.measured(trainer, rows.get("test", []), test):
                results.add(**found)
    return results


if __name__ == "__main__":
    run(main)
