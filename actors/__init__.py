"""What a node is made of: its replica, its task and data, and the Ray actor that hosts it."""
