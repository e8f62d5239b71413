"""Coded: gradients are computed more than once, so that stragglers are not waited for."""
