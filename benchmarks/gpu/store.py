"""Results of one part as a JSON file, written after every case, so that a run can be taken up where it ended."""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Result

#: Says that a file is of this benchmark: others keep theirs in the same folders.
BENCHMARK = "benchmarks.gpu"


class Store:
    """The file of one part.

    header: what must be equal for results to stand together; a file with another one is begun anew.
    """

    def __init__(self, file: Path, header: dict[str, Any], fresh: bool) -> None:
        self._file = file
        header = json.loads(json.dumps({"benchmark": BENCHMARK, **header}))
        found = None if fresh else load(file)
        self.resumed = found is not None and all(found.get(name) == value for name, value in header.items())
        #: What of the header differs from the file that was there and is replaced.
        self.replaced = [
            name
            for name, value in header.items()
            if found is not None and not self.resumed and found.get(name) != value
        ]
        self.content: dict[str, Any] = found if found is not None and self.resumed else {**header, "cases": {}}

    @property
    def cases(self) -> dict[str, Result]:
        return self.content["cases"]

    def record(self, name: str, result: Result) -> None:
        """Add a case; the file is replaced as a whole, so that it is never found half written."""
        self.cases[name] = result
        self._file.parent.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_suffix(".json.new")
        draft.write_text(json.dumps(self.content, indent=1, allow_nan=False) + "\n")
        os.replace(draft, self._file)


def load(file: Path) -> dict[str, Any] | None:
    """What a file of this benchmark holds; None if there is none, or if it is of another benchmark."""
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    return content if isinstance(content, dict) and content.get("benchmark") == BENCHMARK else None
