"""Where the repository and what is imported from it are, for tests and the processes that they start."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src"
PYTHONPATH = f"{SOURCES}{os.pathsep}{ROOT}"
"""What a process needs that imports ``starling`` and ``tests`` of this checkout."""
