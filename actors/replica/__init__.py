"""A node's state: parameters, staged values, transfer, digest."""
