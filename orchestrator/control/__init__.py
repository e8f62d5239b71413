"""The loops over rounds: who is there, what is committed, when state moves."""
