"""Sweeps: many runs on Ray Tune, their trials, files and pictures."""
