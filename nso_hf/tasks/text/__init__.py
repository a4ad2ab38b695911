"""Classification of texts: where they come from, their tokens, and the models."""
