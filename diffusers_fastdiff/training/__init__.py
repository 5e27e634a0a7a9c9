"""What the training scripts in examples/ are made of. Needs the `train` extra."""
