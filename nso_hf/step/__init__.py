"""What a training step does with the weights: move them, put them back, leave nothing else."""
