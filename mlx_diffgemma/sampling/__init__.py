"""Sampling: random draws, the sampler's step and the rules of a canvas."""
