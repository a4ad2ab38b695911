"""Contrastive language-image pretraining: models of open_clip, image-caption pairs, the loss of the
global batch, and evaluation by retrieval and zero-shot classification."""

from importlib.util import find_spec

for _name in ("open_clip", "webdataset", "datasets", "sklearn", "matplotlib", "rich"):
    if find_spec(_name) is None:
        raise ImportError(f"nso_hf.clip needs {_name}: run pip install 'nso_hf[clip]'")
