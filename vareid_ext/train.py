"""``python -m vareid_ext.train`` is ``vareid train``."""

import sys

from _vareid_cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
