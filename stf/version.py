"""The version of stf."""

__version__ = "0.1.0"
