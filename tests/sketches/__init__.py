"""Papers, each written down as a short program, to see whether the operations are enough for it."""
