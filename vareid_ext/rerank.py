"""``python -m vareid_ext.rerank``."""

from vareid_ext.cli.common import run_program
from vareid_ext.cli.rerank import main

if __name__ == "__main__":
    run_program(main)
