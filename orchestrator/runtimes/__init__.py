"""Runtimes carry the controller's decisions out: the interface of both, its events, the network model."""
