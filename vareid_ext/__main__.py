"""``python -m vareid_ext COMMAND`` is ``vareid COMMAND``."""

from _vareid_cli import main

if __name__ == "__main__":
    main()
