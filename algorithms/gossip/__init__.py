"""Decentralized methods: every node has a model of its own, and mixes it with those of its neighbours."""
