"""Zeroth order: losses at several points instead of gradients."""
