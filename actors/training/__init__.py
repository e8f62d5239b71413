"""Training: a gradient and an optimizer step."""
