"""Encodings of everything that nodes exchange: buffers and tickets."""
