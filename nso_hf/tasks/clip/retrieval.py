"""Retrieval: which texts are found for an image, and which images for a text."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nso_hf.tasks.clip.encoding import Encoded

_CHUNK = 1024  # queries compared with all candidates at a time
RECALLS = (1, 5, 10)
METRICS = [
    f"{direction}_{measure}"
    for direction in ("image_to_text", "text_to_image")
    for measure in (*(f"recall@{k}" for k in RECALLS), "mean_rank", "median_rank")
]
"""The names of what `Retrieval.metrics` has."""


@dataclass(frozen=True)
class Retrieval:
    """Where, among all candidates, the first right one came for each query: 1 is first."""

    image_to_text: Tensor
    text_to_image: Tensor
    right: tuple[Tensor, Tensor]
    """How many candidates are right for each query, in both directions."""
    candidates: tuple[int, int]
    """Texts and images to choose from."""

    @property
    def metrics(self) -> dict[str, float]:
        """Recall at 1, 5 and 10 in [0, 1], mean and median rank, in both directions."""
        named = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        metrics = {}
        for name, ranks in named.items():
            for k in RECALLS:
                metrics[f"{name}_recall@{k}"] = (ranks <= k).double().mean().item()
            metrics[f"{name}_mean_rank"] = ranks.double().mean().item()
            metrics[f"{name}_median_rank"] = float(np.median(ranks.numpy()))
        return metrics

    @property
    def chance(self) -> dict[str, float]:
        """What random rankings are expected to give."""
        chance = {}
        directions = ("image_to_text", "text_to_image")
        for name, right, n in zip(directions, self.right, self.candidates, strict=True):
            for k in RECALLS:
                missed = torch.ones(len(right), dtype=torch.double)
                for i in range(min(k, n)):
                    missed *= (1 - right.double() / (n - i)).clamp(min=0)
                chance[f"{name}_recall@{k}"] = 1 - missed.mean().item()
            chance[f"{name}_mean_rank"] = ((n + 1) / (right.double() + 1)).mean().item()
        return chance


@torch.no_grad()
def retrieval(encoded: Encoded, device: torch.device | str = "cpu") -> Retrieval:
    """Rank all texts for each image, and all images for each text.

    Images of one key, and equal captions, are one candidate; any of the captions of an image is
    right for it, and any of the images of a caption. A wrong candidate that scores like the best
    right one counts as before it: a model that maps everything to one point comes last, not first.
    """
    assert encoded.texts is not None
    _, first_image, image_of = np.unique(encoded.keys, return_index=True, return_inverse=True)
    captions = np.array(encoded.captions, dtype=object).astype(str)
    _, first_text, text_of = np.unique(captions, return_index=True, return_inverse=True)
    images = encoded.images[first_image].to(device)
    texts = encoded.texts[first_text].to(device)
    links = torch.from_numpy(np.unique(np.stack([image_of, text_of]), axis=1))
    return Retrieval(
        image_to_text=_ranks(images, texts, links[0], links[1]),
        text_to_image=_ranks(texts, images, links[1], links[0]),
        right=(torch.bincount(links[0]), torch.bincount(links[1])),
        candidates=(len(texts), len(images)),
    )


def _ranks(queries: Tensor, candidates: Tensor, query_of: Tensor, right: Tensor) -> Tensor:
    order = query_of.argsort(stable=True)
    query_of, right = query_of[order], right[order]
    ranks = []
    for start in range(0, len(queries), _CHUNK):
        scores = queries[start : start + _CHUNK] @ candidates.T
        here = slice(*torch.searchsorted(query_of, torch.tensor([start, start + _CHUNK])).tolist())
        rows = (query_of[here] - start).to(scores.device)
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[rows, right[here].to(scores.device)] = True
        best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        is_before = ~(scores < best) & ~is_right  # a score that is no number too
        ranks.append(1 + is_before.sum(dim=1).cpu())
    return torch.cat(ranks)


def best_images(encoded: Encoded, query: int, number: int) -> list[int]:
    """The rows of the images that score best for the caption of row `query`."""
    assert encoded.texts is not None
    scores = encoded.images @ encoded.texts[query]
    return scores.topk(min(number, len(scores))).indices.tolist()
