"""Where NSO adds no noise it is `transformers.Trainer`, bit for bit."""

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from nso_hf import NSOSeq2SeqTrainer, NSOTrainer
from tests.reference import config, largest_difference, tiny_llama, token_data

TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


def run(trainer_class, args, dropout=0.1):
    model = tiny_llama(dropout=dropout)
    masks = []

    def weight_seen(module, *_):
        masks.append(module.weight[0, 0].item())

    model.model.norm.register_forward_hook(lambda module, *_: masks.append(module.weight[0].item()))
    trainer = trainer_class(model=model, args=args, train_dataset=token_data(40))
    trainer.train()
    logs = [
        {k: v for k, v in entry.items() if k not in TIMES} for entry in trainer.state.log_history
    ]
    optimizer = trainer.optimizer.state_dict()["state"]
    return model, logs, optimizer, torch.get_rng_state()


OPTIONS = {
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 3,
    "max_steps": 10,
    "max_grad_norm": 0.5,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "warmup_steps": 3,
    "train_sampling_strategy": "random",
}


@pytest.mark.parametrize(
    "nso",
    [
        {"sigma": 0.0, "num_perturbations": 3},
        {"clean_weight": 1.0},
        {"sigma": 0.0, "clean_weight": 0.3},
    ],
)
def test_no_noise_is_plain_training_bit_for_bit(tmp_path, nso):
    plain_args = config(tmp_path, **OPTIONS)
    plain, plain_logs, plain_state, plain_random = run(Trainer, plain_args)
    model, logs, state, random = run(NSOTrainer, config(tmp_path, **OPTIONS, **nso))
    assert logs == plain_logs
    assert [entry["step"] for entry in logs[:10]] == list(range(1, 11))
    assert all(
        torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True)
    )
    for index, moments in plain_state.items():
        assert all(torch.equal(moments[name], state[index][name]) for name in moments)
    assert torch.equal(random, plain_random)
    # The test can fail: two epochs of shuffled data moved the weights, and noise moves them
    # elsewhere.
    assert largest_difference(plain, tiny_llama()) > 1e-2
    noisy, noisy_logs, _, noisy_random = run(NSOTrainer, config(tmp_path, **OPTIONS))
    assert largest_difference(plain, noisy) > 1e-3
    # Common random numbers: the noisy run has drawn as many random numbers as the plain one.
    assert torch.equal(noisy_random, plain_random)
    assert all("nso/sigma" in entry for entry in noisy_logs[:10])


def test_plain_training_arguments_get_the_defaults(tmp_path):
    kwargs = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": [],
        "max_steps": 1,
        "logging_steps": 1,
    }
    for trainer_class, arguments in [
        (NSOTrainer, TrainingArguments),
        (NSOSeq2SeqTrainer, Seq2SeqTrainingArguments),
    ]:
        trainer = trainer_class(
            model=tiny_llama(), args=arguments(**kwargs), train_dataset=token_data(8)
        )
        trainer.train()
        assert isinstance(
            trainer, Seq2SeqTrainer if "Seq2Seq" in trainer_class.__name__ else Trainer
        )
        assert trainer.state.log_history[0]["nso/sigma"] == 0.01
        assert trainer.nso_args.two_sided and trainer.nso_args.num_perturbations == 1


def test_evaluation_sees_unperturbed_weights_and_plain_losses(tmp_path):
    data = token_data(8)
    args = config(tmp_path, eval_strategy="steps", eval_steps=1, learning_rate=0.0, max_steps=2)
    model = tiny_llama()
    trainer = NSOTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    plain = Trainer(model=tiny_llama(), args=config(tmp_path), eval_dataset=data)
    assert losses == [plain.evaluate()["eval_loss"]] * 2


def test_the_mixin_overrides_only_what_it_means_to():
    from nso_hf import NSOTrainerMixin

    shared = {name for name in vars(NSOTrainerMixin) if hasattr(Trainer, name)}
    overrides = {name for name in shared if not name.startswith("__")}
    assert overrides == {
        "_prepare_inputs",
        "create_accelerator_and_postprocess",
        "get_batch_samples",
        "log",
        "train",
        "training_step",
        "create_optimizer",
        "floating_point_ops",
        "_issue_warnings_after_load",
        "_load_best_model",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_save_optimizer_and_scheduler",
    }


def test_the_trainer_keeps_no_weights_after_training(tmp_path):
    trainer = NSOTrainer(model=tiny_llama(), args=config(tmp_path), train_dataset=token_data(12))
    trainer.train()
    assert trainer._nso_weights is None
    trainer.train()  # and can be asked again
    assert trainer.state.global_step == 3
