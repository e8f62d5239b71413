"""Decentralized: every node has a model of its own and mixes it with its neighbours'."""
