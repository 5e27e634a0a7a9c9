"""Hooks on the denoiser of a pipeline, and the run tracker they share."""
