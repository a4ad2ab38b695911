"""Trains a tiny model in each of several processes, with further data measured before and after."""

import json
import sys
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM

from nso_hf.running.program import leave_process_group
from nso_hf.tasks.reasoning.before_after import BeforeAndAfter
from nso_hf.tasks.reasoning.examples import Columns, Example
from nso_hf.tasks.reasoning.further import FurtherOptions
from nso_hf.tasks.reasoning.prompts import PromptFormat, training_rows
from nso_hf.tasks.reasoning.trainer import ReasoningTrainer
from tests.distributed.back_ends import BACK_ENDS, allow_fsdp_on_cpu
from tests.reference import config
from tests.tiny_models import byte_tokenizer


def measured(folder, model, back_end, batch_size):
    """In a folder that holds prose.txt: (what results.json has, the back end's name)."""
    prompt_format = PromptFormat(byte_tokenizer())
    options = FurtherOptions(
        forgetting_data=[f"{folder}/prose.txt"],
        also_test=["longer=reasoning_gym:chain_sum"],
        further_size=5,
    )
    sets = options.load(prompt_format, [], Columns(), 40, 0)
    examples = [Example(f"{i} + 1", f"{i + 1}", ("count",)) for i in range(16)]
    rows, _ = training_rows(examples, prompt_format, 100)
    # As the Trainer's plain SGD, so that Adam does not make much of the sign of a rounding.
    options = {"sigma": 0.02, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    args = config(folder, per_device_train_batch_size=batch_size, **options, **back_end)
    trainer = ReasoningTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=DataCollatorForSeq2Seq(
            prompt_format.tokenizer, model, label_pad_token_id=-100
        ),
        prompt_format=prompt_format,
        validation=examples[:4],
        max_new_tokens=4,
    )
    found = BeforeAndAfter(trainer, examples[:3], sets)
    trainer.add_callback(found)
    trainer.train()
    return {**found.after(), "validation": trainer.validated(is_average=False)}, trainer


if __name__ == "__main__":
    folder, name = Path(sys.argv[1]), sys.argv[2]
    allow_fsdp_on_cpu()
    torch.manual_seed(0)
    found, trainer = measured(
        folder, LlamaForCausalLM.from_pretrained(folder / "model"), BACK_ENDS[name], 2
    )
    rank = trainer.args.process_index
    text = json.dumps(found | {"backend": trainer.nso_backend.name})
    (folder / f"rank{rank}.json").write_text(text)
    leave_process_group()
