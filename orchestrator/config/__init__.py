"""What the YAML may say, and how errors in it read."""
