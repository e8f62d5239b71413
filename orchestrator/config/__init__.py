"""The schema of configurations, reading and writing them, and messages about errors in them."""
