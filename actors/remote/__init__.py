"""The Ray actor around a host."""
