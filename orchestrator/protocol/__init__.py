"""State machines: rendezvous, mailboxes, pool, ledgers, faults. No I/O, no clock, no Ray."""
