"""``python -m vareid_ext.doctor`` is ``vareid doctor``."""

import sys

from _vareid_cli import main

if __name__ == "__main__":
    main(["doctor", *sys.argv[1:]])
