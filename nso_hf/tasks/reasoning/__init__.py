"""Questions answered by a chain of thought: data, prompts, answers and their evaluation by
generation."""
