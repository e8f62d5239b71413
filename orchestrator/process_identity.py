"""Identity of a process of this machine: its number alone is used again."""

from __future__ import annotations

from pathlib import Path


def started_at(pid: int) -> float | None:
    """Return a process's start time, in clock ticks since this machine booted; ``None`` if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else float(rest[18])
