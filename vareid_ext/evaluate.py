"""``python -m vareid_ext.evaluate`` is ``vareid evaluate``."""

import sys

from _vareid_cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
