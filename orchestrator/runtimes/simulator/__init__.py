"""The runtime in one process, with a virtual clock."""
