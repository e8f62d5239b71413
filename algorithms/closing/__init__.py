"""The close policy interface: when an exchange may close without everyone."""

from starling.algorithms.closing.base import ClosePolicy, Quorum, Waited

__all__ = ["ClosePolicy", "Quorum", "Waited"]
