"""Quantities as people read them."""

from __future__ import annotations

import math

_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


def bytes_text(nbytes: float) -> str:
    """Bytes in decimal units, three digits.

    >>> [bytes_text(n) for n in (0, 999, 1_000, 1_234_567, 45_600_000, 999_999)]
    ['0 B', '999 B', '1.00 kB', '1.23 MB', '45.6 MB', '1.00 MB']
    """
    scale, unit = bytes_unit(nbytes)
    value = nbytes / scale
    return f"{value:.0f} B" if unit == "B" else f"{value:.{_decimals(value)}f} {unit}"


def bytes_unit(nbytes: float) -> tuple[float, str]:
    """The unit in which ``nbytes`` is a number below 1000, and how many bytes it has."""
    scale, power = 1.0, 0
    while nbytes / scale >= 999.5 and power < len(_BYTES) - 1:
        scale, power = scale * 1000, power + 1
    return scale, _BYTES[power]


def seconds_text(seconds: float) -> str:
    """A duration.

    >>> [seconds_text(s) for s in (0.0123, 1.26, 48.3, 75, 3_671, 90_000)]
    ['12 ms', '1.3 s', '48 s', '1 min 15 s', '1 h 01 min', '25 h 00 min']
    """
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"


def number_text(value: float) -> str:
    """A measured number, four digits.

    >>> [number_text(x) for x in (2.30456, 0.975, 1234.5, 0.00001234, 3.0)]
    ['2.305', '0.975', '1234', '1.234e-05', '3']
    """
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def _decimals(value: float) -> int:
    return 2 if value < 9.995 else 1 if value < 99.95 else 0
