"""A step log that ``replay`` reads: CSV in the design's column names, one line a step."""

from __future__ import annotations

import csv
from pathlib import Path
from types import TracebackType

from latencyprism.errors import BadInput
from latencyprism.records import STEP_COLUMNS, Step


class StepLog:
    """Appends steps to a new file; BadInput if it cannot be made. A value not observed is an empty cell."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("x", newline="", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"cannot write {path}", error.strerror or str(error), "name a new file") from None
        self._rows = csv.writer(self._file)
        self._rows.writerow(STEP_COLUMNS)

    def write(self, step: Step) -> None:
        self._rows.writerow(["" if value is None else value for value in step])

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
