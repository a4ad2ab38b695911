"""Contrastive language-image pretraining: models of open_clip, image-caption pairs, the loss of the
global batch, and evaluation by retrieval and zero-shot classification."""
