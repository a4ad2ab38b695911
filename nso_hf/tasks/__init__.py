"""What a recipe and a user need for one task: its data, models, trainer and measures."""
