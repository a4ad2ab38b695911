r"""Fine-tune a language model on chains of thought with Noise Stability Optimization.

    python recipes/cot_finetuning.py --config recipes/configs/demo.yaml
    python recipes/cot_finetuning.py --model_name_or_path gpt2 --dataset gsm8k \
        --output_dir runs/gsm8k --sigma 0.01 --lora_r 16 --learning_rate 3e-4

The model learns to answer a question with a rationale, then "-->", then the answer. Loss on the
completion only. It is evaluated by generation: on validation questions during training (these
choose the best checkpoint), and on test questions before training and once at its end. Everything
of `TrainingArguments` is an option too.
"""

import gc
import json
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, set_seed

from nso_hf import NSOArguments, NSOConfig
from nso_hf.companions.options import CompanionOptions
from nso_hf.refusal import needs, refusal
from nso_hf.running.checkpoints import checkpoint_to_resume, resumable
from nso_hf.running.command_line import RecipeParser
from nso_hf.running.program import run
from nso_hf.running.readiness import check_ready
from nso_hf.running.recorded_options import RecordedOptions, fingerprint
from nso_hf.running.results import trained, versions
from nso_hf.tasks.measurements import MeasurementOptions, plainly
from nso_hf.tasks.reasoning.evaluation import METRICS, Evaluation, evaluate_answers
from nso_hf.tasks.reasoning.examples import Example
from nso_hf.tasks.reasoning.models import ModelOptions, check_lengths, load_model, with_lora
from nso_hf.tasks.reasoning.options import DataOptions, Splits
from nso_hf.tasks.reasoning.prompts import PromptFormat, training_rows
from nso_hf.tasks.reasoning.report import PACKAGES, report
from nso_hf.tasks.reasoning.trainer import AtTheBeginning, ReasoningTrainer

Rows = list[dict[str, Any]]
CONFIGS = Path(__file__).with_name("configs")
OPTIONS = [ModelOptions, DataOptions, MeasurementOptions, CompanionOptions, NSOConfig]


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser(OPTIONS, description=__doc__.split("\n")[0], configs=CONFIGS)
    model_options, data, curvature, companions, args = parser.parse(argv)
    needs("cot_finetuning.py", "recipes", *PACKAGES)
    check_ready(args, ["loss", *METRICS])
    companions.check(args)
    curvature.check(args)
    results = fine_tune(model_options, data, curvature, companions, args, args)
    if curvature.compare_plain:
        gc.collect()  # the first model, before the second is loaded
        if args.process_index == 0:
            print("Plain training, for comparison, from the same start.", flush=True)
        once = replace(data, evaluate_before=False), replace(curvature, curvature_steps=None)
        results["plain"] = fine_tune(model_options, *once, companions, plainly(args), args)
    if args.process_index == 0:
        report(results, Path(str(args.output_dir)))


def prepared(
    model_options: ModelOptions, data: DataOptions, recorded: RecordedOptions, splits: Splits
) -> tuple[torch.nn.Module, PromptFormat, Rows, Rows, int]:
    """The model, how it is asked, the training and validation rows, and how many were too long."""
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
    rows, too_long = training_rows(splits.train, prompt_format, data.max_length)
    validation_rows, _ = training_rows(splits.validation, prompt_format, data.max_length)
    if not rows or not validation_rows:
        texts = f"{len(splits.train)} training texts or {len(splits.validation)} validation texts"
        raise refusal("max_length", data.max_length, f"all {texts} are longer", "Raise it")
    name = model_options.model_name_or_path
    recorded.check("model_name_or_path", name, "tokens of the training texts", fingerprint(rows))
    weights = fingerprint((n, p.flatten()[:8].tolist()) for n, p in model.named_parameters())
    recorded.check("model_name_or_path", name, "weights", weights)
    if model_options.lora_r is not None:
        collate = DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=-100)
        model = with_lora(model, model_options, is_encoder_decoder, dict(collate(rows[:8])))
    asked = [*splits.validation, *splits.test]
    prompts = [prompt_format.prompt_ids(example.question) for example in asked]
    longest_row = max(
        len(row[name]) for row in [*rows, *validation_rows] for name in ("input_ids", "labels")
    )
    check_lengths(model, data.max_length, data.max_new_tokens, longest_row, max(map(len, prompts)))
    return model, prompt_format, rows, validation_rows, too_long


def fine_tune(
    model_options: ModelOptions,
    data: DataOptions,
    curvature: MeasurementOptions,
    companions: CompanionOptions,
    args: NSOConfig,
    asked: NSOConfig,
) -> dict[str, Any]:
    """Train, evaluate, write the model and the predictions; return what goes into results.json.

    `asked` are the training options of the command, which `args` are made from.
    """
    checkpoint = checkpoint_to_resume(args)
    groups = (model_options, data, curvature, companions)
    recorded = RecordedOptions(args, *groups, checkpoint=checkpoint)
    started = time.monotonic()
    set_seed(args.seed)
    with args.main_process_first():
        splits = data.load(args.seed)
    for split, examples in zip(("training", "validation", "test"), splits, strict=True):
        recorded.check("dataset", data.dataset, f"{split} examples", fingerprint(examples))
    model, prompt_format, rows, validation_rows, too_long = prepared(
        model_options, data, recorded, splits
    )
    tokenizer = prompt_format.tokenizer
    trainer = ReasoningTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=-100),
        callbacks=companions.callbacks(),
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

    trainer.answer = lambda: answer(splits.validation, "Validation")
    output = Path(str(args.output_dir))
    if trainer.is_world_process_zero():
        print(data.described(splits, len(rows), too_long))
        print(f"prompt: {prompt_format.prompt(splits.train[0].question)!r}")
        print(f"completion: {prompt_format.completions(splits.train[0])[0]!r}", flush=True)
    before_file = output / "before.json"  # read by a resumed run, whose model has changed since
    before = json.loads(before_file.read_text()) if checkpoint and before_file.exists() else None
    answering_seconds = 0.0

    def answer_before() -> None:  # once the model is where, and sharded as, the back end wants it
        nonlocal before, answering_seconds
        began = time.monotonic()
        answers_before = answer(splits.test, "Test, before training")
        before = answers_before.summary()
        if trainer.is_world_process_zero():
            answers_before.write(output / "predictions_before.jsonl")
            before_file.write_text(json.dumps(before, indent=2))
        answering_seconds = time.monotonic() - began

    if data.evaluate_before and not checkpoint:
        trainer.add_callback(AtTheBeginning(answer_before))
    with resumable(asked, lambda: trainer.state):
        figures = trained(trainer, recorded, checkpoint, curvature.callback(trainer, rows))
        figures["train_seconds"] = round(figures["train_seconds"] - answering_seconds, 2)
        trainer.save_model()
        answers = answer(splits.test, "Test, after training")
    after = answers.summary()
    if trainer.is_world_process_zero():
        answers.write(output / "predictions.jsonl")
    return {
        **figures,
        "before": before,
        "after": after,
        "total_seconds": round(time.monotonic() - started, 1),
        "texts": len(rows),
        "texts_too_long": too_long,
        "model_options": asdict(model_options),
        "data_options": asdict(data),
        "curvature_options": asdict(curvature),
        "companion_options": asdict(companions),
        "nso_options": {option.name: getattr(args, option.name) for option in fields(NSOArguments)},
        "options": recorded.history,
        "versions": versions(),
    }


if __name__ == "__main__":
    run(main)
