"""Collections of images that have names."""

NAMED = ("digits", "fashion_mnist", "openmoji")
"""They have the splits `SPLITS`, and no columns."""

SPLITS = ("train", "test")
