"""Records of a run in its directory, and the observers that receive them."""
