"""Coded methods: data are computed more than once, so that nobody waits for stragglers and nothing is missing."""
