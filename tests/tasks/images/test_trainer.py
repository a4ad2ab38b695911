"""The Trainer of masked autoencoders is the paper's formula in a plain loop."""

import pytest
import torch
import transformers

from nso_hf import NSOConfig
from nso_hf.tasks.images.models import (
    classifier_of,
    load_autoencoder,
    representations,
)
from nso_hf.tasks.images.trainer import MAETrainer
from tests.reference import largest_difference
from tests.tasks.images.reference import (
    RandomImages,
    data,
    mae_config,
    micro_batches,
    reference_mae,
    tiny_mae,
    trained,
)

FORMULA = {"strength": 0.5, "radius": 2.0, "draws": 3, "rate": 0.1}


@pytest.mark.parametrize("sigma", [0.0, 0.02])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_is_the_plain_loop(tmp_path, sigma, accumulation):
    dataset, model, reference = data(), tiny_mae(), tiny_mae()
    start = tiny_mae()
    trainer = trained(
        model,
        dataset,
        mae_config(tmp_path, sigma=sigma, gradient_accumulation_steps=accumulation),
    )
    batches = micro_batches(dataset, 4, 3 * accumulation)
    steps = [[batches[i : i + accumulation]] for i in range(0, len(batches), accumulation)]
    losses = reference_mae(reference, steps, trainer.states, sigma=sigma, **FORMULA)
    # Weights of size 1 in float32 are 6e-8 apart at each rounding; gradients are of size 1, times a
    # rate of 0.1 and three steps.
    assert largest_difference(model, reference) < 1e-6
    assert largest_difference(model, start) > 1e-2  # it moved by far more
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-4)  # logged with four decimals by older versions
    assert all(
        entry["rademacher/complexity"] > 0 for entry in trainer.state.log_history if "loss" in entry
    )


def test_other_signs_at_minus_u_would_show(tmp_path):
    """Without common random numbers the training is another one."""
    models = [tiny_mae(), tiny_mae()]
    for model, common in zip(models, (True, False), strict=True):
        trained(model, data(), mae_config(tmp_path, sigma=0.02, common_random_numbers=common))
    assert largest_difference(*models) > 1e-4


def test_strength_zero_is_the_model_of_transformers(tmp_path):
    """Bit for bit, with its own Trainer."""
    ours, theirs = tiny_mae(), tiny_mae()
    args = mae_config(tmp_path, sigma=0.0, rademacher_strength=0.0)
    trained(ours, RandomImages(24, 1), args)
    plain = transformers.ViTMAEForPreTraining(theirs.config)
    plain.load_state_dict(theirs.state_dict())
    transformers.Trainer(model=plain, args=args, train_dataset=RandomImages(24, 1)).train()
    assert largest_difference(ours, plain) == 0


def test_target_images_are_a_function_of_the_batch():
    dataset = data()
    once, again = (dataset.__getitems__([3, 1, 7]) for _ in range(2))
    other = dataset.__getitems__([3, 1, 8])

    def targets(batch):
        return torch.stack([example["target_pixel_values"] for example in batch])

    assert torch.equal(targets(once), targets(again))
    assert not torch.equal(targets(once), targets(other))
    known = dataset.targets.values
    found = {(known == image).flatten(1).all(dim=1).nonzero().item() for image in targets(once)}
    assert len(found) == 3  # different ones
    assert torch.equal(once[0]["pixel_values"], dataset.images.values[3])


def test_the_representation_sees_the_whole_image_and_draws_nothing():
    model = tiny_mae(mask_ratio=0.75)
    x = torch.randn(3, 1, 8, 8)
    state = torch.get_rng_state()
    h = representations(model.vit, x)
    assert torch.equal(state, torch.get_rng_state()) and model.config.mask_ratio == 0.75
    # The order of tokens that have their positions is of no matter: random ones give the same.
    model.config.mask_ratio = 0.0
    tokens = model.vit(x, noise=torch.rand(3, 16)).last_hidden_state
    torch.testing.assert_close(h, tokens[:, 1:].mean(dim=1), rtol=1e-5, atol=1e-6)
    changed = x.clone()
    changed[:, :, -1, -1] += 1
    assert ((representations(model.vit, changed) - h).abs().amax(dim=1) > 1e-4).all()


def test_positions_are_there_and_fixed(tmp_path):
    """A new model of transformers has none, and a loaded one trains them."""
    model = tiny_mae()
    model.save_pretrained(tmp_path)
    for made in (model, load_autoencoder(str(tmp_path))):
        for positions in (
            made.vit.embeddings.position_embeddings,
            made.decoder.decoder_pos_embed,
        ):
            assert not positions.requires_grad
            assert len(positions[0].unique(dim=0)) == 17  # one of its own for each patch, and 0
    assert load_autoencoder(str(tmp_path)).config.architectures == ["ViTMAEForPreTraining"]
    assert largest_difference(model, load_autoencoder(str(tmp_path))) == 0


def test_a_resumed_run_goes_on_from_the_weights(tmp_path):
    """transformers writes other names than a model's own, which its Trainer does not read."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    models = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        models.append(tiny_mae())
        args = mae_config(tmp_path, **saving)
        trainer = MAETrainer(model=models[-1], args=args, train_dataset=data())
        trainer.train(resume_from_checkpoint=checkpoint)
    assert largest_difference(*models) == 0
    assert largest_difference(models[0], tiny_mae()) > 1e-4


def test_a_classifier_begins_with_the_encoder():
    model = tiny_mae()
    classifier = classifier_of(model, 3)
    x = torch.randn(2, 1, 8, 8)
    logits = classifier(x)["logits"]
    expected = classifier.classifier(representations(model.vit, x))
    assert torch.equal(logits, expected) and logits.shape == (2, 3)
    classifier.vit.layernorm.bias.data += 1  # a copy
    assert largest_difference(model, tiny_mae()) == 0


def test_evaluation_has_the_loss_of_pretraining_alone(tmp_path):
    model = tiny_mae()
    args = mae_config(tmp_path)
    trainer = MAETrainer(
        model=model, args=args, train_dataset=data(), eval_dataset=RandomImages(4, 3)
    )
    state = torch.get_rng_state()
    found = trainer.evaluate()["eval_loss"]
    torch.set_rng_state(state)
    (batch,) = trainer.get_eval_dataloader()  # which draws a seed before the masks are drawn
    with torch.no_grad():
        expected = model.eval()(**batch).loss
    assert found == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "dataset", "message"),
    [
        ({"rademacher_strength": -1.0}, data, "rademacher_strength=-1.0: must be a finite number"),
        ({"rademacher_draws": 0}, data, "rademacher_draws=0: must be an integer, at least 1"),
        ({"rademacher_radius": 0.0}, data, "rademacher_radius=0.0: must be a finite number above"),
        ({}, lambda: RandomImages(8, 1), r"come without images of the task to come. Use WithT"),
        (
            {"per_device_train_batch_size": 8},
            lambda: data(targets=7),
            "per_device_train_batch_size=8: there are 7 target images.*Use at most 7",
        ),
    ],
)
def test_what_is_refused(tmp_path, options, dataset, message):
    with pytest.raises(ValueError, match=message):
        MAETrainer(model=tiny_mae(), args=mae_config(tmp_path, **options), train_dataset=dataset())


def test_other_arguments_are_refused(tmp_path):
    args = NSOConfig(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="args='NSOConfig': it has no options of masked"):
        MAETrainer(model=tiny_mae(), args=args, train_dataset=data())
