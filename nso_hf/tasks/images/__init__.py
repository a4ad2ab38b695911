"""Images: reading them, telling them apart, and pretraining masked autoencoders on them."""
