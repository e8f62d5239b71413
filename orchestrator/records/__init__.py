"""What a run leaves in its directory, and who is told."""
