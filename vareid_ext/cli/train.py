"""The command that trains."""

from vareid_ext.train import main

__all__ = ["main"]
