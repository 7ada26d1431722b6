"""``python -m vareid_ext.evaluate``."""

from vareid_ext.cli.common import run_program
from vareid_ext.cli.evaluate import main

if __name__ == "__main__":
    run_program(main)
