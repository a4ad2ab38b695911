"""A tiny CLIP with data, and its training written as a plain loop around open_clip's own losses."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.loss import SigLipLoss
from PIL import Image
from torch import Tensor, nn

from nso_hf.step.noise import Noise
from nso_hf.tasks.clip.arguments import CLIPConfig
from nso_hf.tasks.clip.models import ClipModel, load_clip
from tests.reference import whole_noise

VOCABULARY, CONTEXT, IMAGE, WIDTH = 64, 8, 16, 16

TINY: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {
        "image_size": IMAGE,
        "layers": 2,
        "width": WIDTH,
        "head_width": 8,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": WIDTH,
        "heads": 2,
        "layers": 2,
    },
}
COCA: dict[str, Any] = {
    **TINY,
    "vision_cfg": {
        **TINY["vision_cfg"],
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "text_cfg": {**TINY["text_cfg"], "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": WIDTH,
        "heads": 2,
        "layers": 1,
    },
    "custom_text": True,
}


def tiny_clip(kind: str = "clip", seed: int = 0, **options: Any) -> ClipModel:
    """Its kind is clip, siglip or coca."""
    config = COCA if kind == "coca" else TINY
    config = {**config, **options}
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        # Not a name that open_clip takes for one of its own models with a tokenizer from the hub.
        path = Path(folder) / f"tiny-{kind.replace('siglip', 'sigmoid')}.json"
        path.write_text(json.dumps(config))
        clip = load_clip(str(path), siglip=kind == "siglip")
    return replace(clip, tokenizer=tokenize)


def tokenize(texts: list[str]) -> Tensor:
    """Letters as tokens, the last of them the largest."""
    rows = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        tokens = [1 + ord(letter) % (VOCABULARY - 2) for letter in text[: CONTEXT - 1]]
        row[: len(tokens) + 1] = torch.tensor([*tokens, VOCABULARY - 1])
    return rows


def pair_data(pairs: int, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(pairs, 3, IMAGE, IMAGE, generator=generator)
    # The end of a text is where its largest token stands; 0 is padding.
    texts = torch.randint(1, VOCABULARY - 1, (pairs, CONTEXT), generator=generator)
    ends = torch.randint(3, CONTEXT, (pairs,), generator=generator)
    texts[torch.arange(CONTEXT) > ends[:, None]] = 0
    texts[torch.arange(pairs), ends] = VOCABULARY - 1
    return [{"image": i, "text": t} for i, t in zip(images, texts, strict=True)]


def image_rows(rows: int) -> list[dict[str, Any]]:
    """Images of one colour, with captions that differ."""
    colours = [(23 * i % 256, 71 * i % 256, 149 * i % 256) for i in range(rows)]
    return [
        {
            "image": Image.new("RGB", (IMAGE, IMAGE), colour),
            "caption": f"{number} of a kind",
            "label": ("even", "odd")[number % 2],
        }
        for number, colour in enumerate(colours)
    ]


def clip_config(output_dir: Any, **options: Any) -> CLIPConfig:
    """Plain gradient descent without shuffling, saving or reporting, unless asked for."""
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "dataloader_drop_last": True,
        "max_steps": 3,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
    }
    return CLIPConfig(**(defaults | options))


def open_clip_loss(kind: str) -> nn.Module:
    """As open_clip's own script makes it for one process."""
    if kind == "coca":
        return open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    return SigLipLoss() if kind == "siglip" else open_clip.ClipLoss()


def reference_clip(
    model: nn.Module,
    kind: str,
    data: list[dict[str, Tensor]],
    *,
    steps: int,
    global_batch: int,
    sigma: float,
    signs: tuple[int, ...] = (1, -1),
    learning_rate: float = 0.1,
    parts: int = 1,
    seed: int = 42,
) -> tuple[list[float], list[list[Tensor]]]:
    """Gradient descent on the mean over `signs` of the gradient of open_clip's loss of the whole
    batch at W + sign U; 0 is W. The weights of the logits are not perturbed. The caption loss is
    the mean over `parts` of the batch. Trains `model` in place.

    Returns:
        The loss and the gradient of each step.
    """
    loss_of = open_clip_loss(kind)
    named = dict(model.named_parameters())
    losses, gradients = [], []
    for step in range(steps):
        examples = data[step * global_batch : (step + 1) * global_batch]
        batch = {name: torch.stack([e[name] for e in examples]) for name in ("image", "text")}
        noise = Noise(seed, step, 0, 1.0, "normal")
        U = [sigma * whole_noise(p, i, noise).to(p.dtype) for i, p in enumerate(named.values())]
        W = {name: p.detach().clone() for name, p in named.items()}
        total = 0.0
        gradient = [torch.zeros_like(p) for p in named.values()]
        for sign in signs:
            for (name, p), u in zip(named.items(), U, strict=True):
                p.data = W[name] if name.startswith("logit_") else W[name] + sign * u
            model.zero_grad()
            outputs = model(**batch)
            if kind == "coca":
                clip, _ = loss_of(**outputs)
                logits, labels = (outputs[name].chunk(parts) for name in ("logits", "labels"))
                cross_entropy = nn.CrossEntropyLoss(ignore_index=0)
                captions = [
                    2.0 * cross_entropy(x.permute(0, 2, 1), y)
                    for x, y in zip(logits, labels, strict=True)
                ]
                f = clip + sum(captions) / parts
            else:
                f = loss_of(**outputs)
            f.backward()
            total += f.item() / len(signs)
            for g, p in zip(gradient, named.values(), strict=True):
                if p.grad is not None:
                    g.add_(p.grad, alpha=1 / len(signs))
        for (name, p), g in zip(named.items(), gradient, strict=True):
            p.data = W[name] - learning_rate * g
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.605170185988092)
        losses.append(total)
        gradients.append(gradient)
    model.zero_grad()
    return losses, gradients
