"""`python -m kvzip.small NAME` prints the directory of a small model, which it builds the first time."""

import sys

from .packages import main

if __name__ == "__main__":
    sys.exit(main())
