"""The root of all errors that speak to the person who can act; ``orchestrator.errors`` draws the whole tree."""

from __future__ import annotations


class StarlingError(Exception):
    """Says in one line what is wrong, where, and what would be right. Never shown with a traceback."""


class SettingsError(StarlingError):
    """Hyper-parameters that are valid one by one, and cannot work together."""


class DataError(StarlingError):
    """The data cannot be read, or cannot be divided as asked."""


class ProgramError(StarlingError):
    """An algorithm's program broke a rule of ``algorithms.api``."""


class ImportPathError(StarlingError):
    """An import path (``package.module:Class``) does not lead to a class."""
