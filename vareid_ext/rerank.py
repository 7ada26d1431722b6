"""``python -m vareid_ext.rerank`` is ``vareid rerank``."""

import sys

from _vareid_cli import main

if __name__ == "__main__":
    main(["rerank", *sys.argv[1:]])
