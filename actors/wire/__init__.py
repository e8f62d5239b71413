"""What travels between nodes: buffers and tickets."""
