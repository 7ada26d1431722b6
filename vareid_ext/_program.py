"""How the programs end; ``vareid_ext.train`` still asks for it here."""

from vareid_ext.cli.common import run_program

__all__ = ["run_program"]
