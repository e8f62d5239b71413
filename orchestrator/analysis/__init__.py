"""Analysis of a configuration that is not trained: its plan, traffic, data and topology."""
