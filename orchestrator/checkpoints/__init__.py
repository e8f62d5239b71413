"""Checkpoints: save, verify, load and export state."""
