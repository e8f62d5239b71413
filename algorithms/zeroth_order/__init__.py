"""Methods without gradients: losses at several points, and what can be learned from them."""
