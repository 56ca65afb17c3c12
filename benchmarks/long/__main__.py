"""`python -m benchmarks.long`."""

import sys

from benchmarks.long.command import main

if __name__ == "__main__":
    sys.exit(main())
