"""Checkpoints on disk: layouts, reading, conversion and the hub."""
