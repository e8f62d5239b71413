"""Nodes: replica, task and data of each, and the Ray actor that hosts them."""

import os
import time

IMPORTED_AT = time.monotonic()
"""Reading of the monotonic clock, in seconds, before this process imported torch and the other slow modules."""

# Torch reads it when it is imported. A round's results are as large as the model and are allocated anew each time; with
# pages of 4 KB the kernel takes longer to clear them, one fault each, than the node takes to copy the result.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
