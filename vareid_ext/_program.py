"""How ``python -m vareid_ext.train`` ends."""

import sys
from collections.abc import Callable
from typing import NoReturn

from _vareid_cli import main


def run_program(train: Callable[[], int]) -> NoReturn:
    """Run ``vareid train``."""
    main(["train", *sys.argv[1:]])
