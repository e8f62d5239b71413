"""Low communication: many inner steps between two exchanges; and data-parallel training, the baseline."""
