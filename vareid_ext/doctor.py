"""``python -m vareid_ext.doctor``."""

from vareid_ext.cli.common import run_program
from vareid_ext.cli.doctor import main

if __name__ == "__main__":
    run_program(main)
