"""`python -m benchmarks.quality`, or `python benchmarks/quality`."""

import sys
from pathlib import Path

if not __package__:
    # Run as a folder, it stands first on the path itself: its modules would hide others of the same name.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks import measure
from benchmarks.quality.command import main

if __name__ == "__main__":
    measure.restart_with_malloc_settings()
    main()
