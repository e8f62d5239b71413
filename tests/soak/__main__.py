"""``python -m tests.soak NUMBER SEED [PROCESSES]``: live through so many histories; exit code 1 if one goes wrong."""

from __future__ import annotations

import sys

from tests.soak.run import main

if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])))
