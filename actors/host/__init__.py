"""The host drives the programs of one process, and their side of each exchange."""
