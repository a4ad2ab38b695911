"""Contrastive language-image pretraining: models of open_clip, image-caption pairs, the loss of the
global batch, and evaluation by retrieval and zero-shot classification."""

from nso_hf.refusal import needs

needs("nso_hf.clip", "clip", "open_clip", "webdataset", "datasets", "sklearn", "matplotlib", "rich")
