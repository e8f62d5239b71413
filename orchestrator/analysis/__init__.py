"""What is known of a configuration without running it: its plan, traffic, data and topology."""
