"""Classifiers of anything: which examples are trained on and judged by, and how well they do."""
