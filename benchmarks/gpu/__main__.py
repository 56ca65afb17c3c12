"""`python -m benchmarks.gpu`, or `python benchmarks/gpu`."""

import sys
from pathlib import Path

if not __package__:
    # Run as a folder, it stands first on the path itself: its modules would hide others of the same name.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.gpu.bare import prepared

# Only then: all else needs what is installed. Processes that this one starts import this file too, and run nothing.
if __name__ == "__main__":
    left = prepared(sys.argv[1:])
    if left is None:
        from benchmarks.gpu.command import main

        left = main()
    sys.exit(left)
