"""Methods that communicate rarely: many inner steps for each exchange; and data-parallel training, for comparison."""
