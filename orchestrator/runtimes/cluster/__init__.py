"""The runtime on Ray: actors, programs, exchanges and state of a cluster's nodes."""
