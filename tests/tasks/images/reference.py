"""A tiny masked autoencoder, images, and training by the paper's formulas in a plain loop."""

import torch
from transformers import TrainerCallback, ViTMAEConfig

import tests.older  # noqa: F401 - before a configuration is made
from nso_hf.tasks.images.arguments import MAEConfig
from nso_hf.tasks.images.dataset import Images, Pixels, WithTargetImages
from nso_hf.tasks.images.models import new_autoencoder, representations
from nso_hf.tasks.images.trainer import MAETrainer
from tests.reference import draw

SIZES = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "decoder_hidden_size": 8,
    "decoder_intermediate_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}
PIXELS = Pixels(8, 1, (0.5,), (0.5,))


def tiny_mae(**options):
    torch.manual_seed(0)
    return new_autoencoder(ViTMAEConfig(**SIZES, **options))


class RandomImages(Images):
    """Of random pixels."""

    def __init__(self, number, seed):
        super().__init__("random", range(number), ["ab"[i % 2] for i in range(number)], PIXELS)
        self.values = torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(seed))

    def __getitem__(self, index):
        return {"pixel_values": self.values[index]}


def data(number=24, targets=40):
    return WithTargetImages(RandomImages(number, 1), RandomImages(targets, 2), seed=5)


def mae_config(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "rademacher_strength": 0.5,
        "rademacher_radius": 2.0,
        "rademacher_draws": 3,
    }
    return MAEConfig(**(defaults | options))


class Recorded(TrainerCallback):
    """The random state that each step begins with, and its micro-batches."""

    def __init__(self):
        self.states = []

    def on_step_begin(self, *args, **kwargs):
        self.states.append(torch.get_rng_state())


def trained(model, train_dataset, args):
    """The trainer, with the random state at the beginning of each step in `states`."""
    recorded = Recorded()
    trainer = MAETrainer(model=model, args=args, train_dataset=train_dataset, callbacks=[recorded])
    trainer.train()
    trainer.states = recorded.states
    return trainer


def loss_of(model, batch, strength, radius, draws):
    """L_pretrain + lambda R mean_j || (1/n) sum_i s_ij h(x_i) ||; masks, then signs, from torch's
    global generator."""
    x = batch["pixel_values"]
    patches = model.patchify(x)
    noise = torch.rand(patches.shape[:2])
    loss = model(x, noise=noise).loss
    if strength:
        h = representations(model.vit, batch["target_pixel_values"])
        s = 2.0 * torch.randint(0, 2, (draws, len(h), 1)).squeeze(-1) - 1
        norms = [(s[j] @ h / len(h)).square().sum().sqrt() for j in range(draws)]
        loss = loss + strength * radius * sum(norms) / draws
    return loss


def reference_mae(model, steps, states, *, sigma, strength, radius, draws, rate, seed=42):
    """SGD on the mean of the gradients at W + U and W - U; `steps` are lists of lists of
    micro-batches, one for each process, and `states` the random state of each step."""
    parameters = list(model.parameters())
    trained = [p.requires_grad for p in parameters]
    losses = []
    for number, (processes, state) in enumerate(zip(steps, states, strict=True)):
        W = [p.detach().clone() for p in parameters]
        U = draw(model, seed, number, 0, sigma, "normal")
        gradient = [torch.zeros_like(w) for w in W]
        parts, loss = sum(map(len, processes)), 0.0
        for batches in processes:
            torch.set_rng_state(state)
            for batch in batches:
                begin = torch.get_rng_state()
                for sign in (1, -1):
                    torch.set_rng_state(begin)  # the same masks and signs
                    for p, w, u in zip(parameters, W, U, strict=True):
                        p.data = w + sign * u
                    model.zero_grad()
                    f = loss_of(model, batch, strength, radius, draws)
                    f.backward()
                    loss += f.item() / 2 / parts
                    for g, p in zip(gradient, parameters, strict=True):
                        if p.grad is not None:
                            g.add_(p.grad, alpha=0.5 / parts)
        for p, w, g, is_trained in zip(parameters, W, gradient, trained, strict=True):
            p.data = w - rate * g if is_trained else w
        losses.append(loss)
    return losses


def micro_batches(dataset, size, count, process=0, processes=1):
    """`count` batches that a process gets from a sequential sampler, which deals them in turns."""
    found = []
    for number in range(count):
        first = (number * processes + process) * size
        examples = dataset.__getitems__(list(range(first, first + size)))
        found.append({name: torch.stack([e[name] for e in examples]) for name in examples[0]})
    return found
