"""Recorded step logs: CSV, optionally gzip, in one of the known column sets, as ``Step`` records.

Everything in the file is hostile until parsed: a row that cannot be used is an error that names row and
column, or is counted and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from latencyprism.detect.rows import RowError, integer, lines, number, open_table
from latencyprism.errors import BadInput
from latencyprism.records.step import PHASES, STEP_COLUMNS, Step

ARTEFACT_COLUMNS = (
    "job_name", "start_ts", "duration_us", "batch_size",
    "avg_input_length", "max_input_length", "avg_output_length", "max_output_length",
)  # fmt: skip
PROBE_FIELDS = {
    "n_reqs": "requests", "n_prefill": "prefill_requests", "tok_prefill": "prefill_tokens",
    "n_decode": "decode_requests", "tok_cached": "cached_tokens", "ctx_sum": "context_tokens",
    "attn_prefill": "attention_work", "running": "running", "waiting": "waiting",
}  # fmt: skip
PROBE_COLUMNS = (
    "segment", "phase", "fault_on", "stop_overlap", "t_start_ns", "t_end_ns", "step_ms", "schedule_ms",
    "launch_ms", "execute_ms", "update_ms", "n_reqs", "tok_sched", "n_new", "n_prefill", "tok_prefill",
    "n_decode", "tok_cached", "ctx_sum", "ctx_decode", "ctx_prefill", "attn_prefill", "ctx_max", "n_resumed",
    "running", "waiting", "tok_out", "n_out", "n_finished", "self_us", "worker_execute_ms",
    "worker_sample_ms",
)  # fmt: skip
LATEST_NS = 2**62

Fields = dict[str, str]


def _step(fields: Fields, row: int) -> Step:
    """The design's own columns."""
    values: dict[str, object] = {"engine": fields.get("engine", "")[:16], "replica": 0, "rank": 0}
    for column, text in fields.items():
        if column == "engine":
            continue
        if column == "phase":
            if text not in ("", *PHASES):
                raise RowError(f"{text[:40]!r} is none of {', '.join(PHASES)}", column)
            values[column] = text or None
            continue
        value = number(text, column) if column == "kv_usage" else integer(text, column)
        if value is None and column in ("start_ns", "end_ns"):
            raise RowError("no value", column)
        if value is not None and value < 0:
            raise RowError(f"{text[:40]!r} is negative", column)
        if value is not None or column not in ("replica", "rank"):
            values[column] = value
    values["step"] = row
    return Step(**values)  # type: ignore[arg-type]


def _needed(fields: Fields, column: str) -> float:
    value = number(fields[column], column)
    if value is None:
        raise RowError("no value", column)
    if value < 0:
        raise RowError(f"{fields[column][:40]!r} is negative", column)
    return value


def _artefact(fields: Fields, row: int) -> Step:
    """start_ts and duration in µs; lengths are means over the batch."""
    start_ns = int(_needed(fields, "start_ts") * 1000.0)
    duration_ns = int(_needed(fields, "duration_us") * 1000.0)
    batch = integer(fields["batch_size"], "batch_size")
    if batch is None or batch < 0:
        raise RowError(f"{fields['batch_size'][:40]!r} is no batch size", "batch_size")
    length = _needed(fields, "avg_input_length") + _needed(fields, "avg_output_length")
    for column in ("max_input_length", "max_output_length"):
        _needed(fields, column)
    context = round(batch * length)
    if max(batch, context, start_ns + duration_ns) > LATEST_NS:
        raise RowError("too large", "batch_size" if batch > LATEST_NS else "start_ts")
    return Step(
        "vllm", 0, 0, row, start_ns, start_ns + duration_ns,
        requests=batch, decode_requests=batch, context_tokens=context,
    )  # fmt: skip


def _probe(fields: Fields, row: int) -> Step:
    """The probe study's columns: one record per vLLM step."""
    values: dict[str, object] = {}
    for column, name in PROBE_FIELDS.items():
        value = integer(fields[column], column)
        if value is not None and value < 0:
            raise RowError(f"{fields[column][:40]!r} is negative", column)
        values[name] = value
    start_ns, end_ns = integer(fields["t_start_ns"], "t_start_ns"), integer(fields["t_end_ns"], "t_end_ns")
    if start_ns is None or end_ns is None:
        raise RowError("no value", "t_start_ns" if start_ns is None else "t_end_ns")
    return Step("vllm", 0, 0, row, start_ns, end_ns, **values)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Format:
    """``required`` columns must be there, ``known`` may be; ``ends`` names the column to blame for a step
    that ends before it starts; a change of ``stretch`` is a break in the record."""

    read: Callable[[Fields, int], Step]
    known: tuple[str, ...]
    required: tuple[str, ...]
    starts: str
    ends: str
    stretch: str = ""
    gapless: bool = False
    """Every step of a stretch is in the file, so the idle time between two can be taken from their times."""


FORMATS = {
    "steps": Format(_step, STEP_COLUMNS, ("start_ns", "end_ns"), "start_ns", "end_ns"),
    "latencyprism-artefact": Format(
        _artefact, ARTEFACT_COLUMNS, ARTEFACT_COLUMNS[1:], "start_ts", "duration_us", "job_name"
    ),
    "vllm-probe": Format(
        _probe,
        PROBE_COLUMNS,
        ("t_start_ns", "t_end_ns", *PROBE_FIELDS),
        "t_start_ns",
        "t_end_ns",
        "segment",
        True,
    ),
}
"""By the name that ``--format`` takes."""


@dataclass(slots=True)
class StepLog:
    """Iterate once for the steps; ``step`` of each is its 0-based row. ``skipped`` rows and
    ``unknown_columns`` are counted only with ``skip_bad``; otherwise BadInput is raised."""

    path: Path
    format: str = "steps"
    skip_bad: bool = False
    skipped: int = 0
    unknown_columns: list[str] = field(default_factory=list)
    stretches: list[str] = field(default_factory=list)
    """For each step given, the stretch of the record it belongs to (job, segment), "" if not told."""

    def __iter__(self) -> Iterator[Step]:
        form = FORMATS[self.format]
        with open_table(self.path) as table:
            rows = lines(table)
            header = self._header(next(rows, None), form)
            latest: dict[tuple[str, int, int], int] = {}
            before: tuple[str, int] | None = None
            for row, fields in enumerate(rows):
                if fields == []:
                    continue
                try:
                    step, stretch = self._read(header, fields, row, form)
                    stream = (step.engine, step.replica, step.rank)
                    if step.start_ns < latest.get(stream, 0):
                        raise RowError(
                            "starts before the row above: rows must be in order of time", form.starts
                        )
                except RowError as error:
                    self._bad(error, row)
                    if error.final:
                        return
                    continue
                latest[stream] = step.start_ns
                if form.gapless:
                    if before is not None and before[0] == stretch:
                        step = step._replace(gap_ns=max(0, step.start_ns - before[1]))
                    before = (stretch, step.end_ns)
                self.stretches.append(stretch)
                yield step

    def _read(
        self, header: list[str], fields: list[str] | RowError, row: int, form: Format
    ) -> tuple[Step, str]:
        if isinstance(fields, RowError):
            raise fields
        if len(fields) != len(header):
            raise RowError(
                f"{len(fields)} fields where the header has {len(header)}", _first_odd(header, fields)
            )
        named = {name: text for name, text in zip(header, fields) if name in form.known}
        step = form.read(named, row)
        if step.end_ns < step.start_ns:
            raise RowError("the step ends before it starts", form.ends)
        return step, named.get(form.stretch, "")

    def _header(self, first: list[str] | RowError | None, form: Format) -> list[str]:
        what = f"{self.path} is no step log"
        if first is None or first == []:
            raise BadInput(what, "it is empty")
        if isinstance(first, RowError):
            raise BadInput(what, f"row 0 (header): {first.why}")
        twice = sorted({name for name in first if first.count(name) > 1})
        if twice:
            raise BadInput(what, f"header: column {twice[0][:40]!r} appears twice")
        lacking = [name for name in form.required if name not in first]
        if lacking:
            others = [name for name in FORMATS if all(c in first for c in FORMATS[name].required)]
            remedy = f"It looks like --format {others[0]}" if others else ""
            raise BadInput(what, f"header: column {lacking[0]!r} is missing", remedy)
        unknown = [name for name in first if name not in form.known]
        if unknown and not self.skip_bad:
            raise BadInput(
                what, f"header: unknown column {unknown[0][:40]!r}", "--skip-bad leaves unknown columns out"
            )
        self.unknown_columns = unknown
        return first

    def _bad(self, error: RowError, row: int) -> None:
        if self.skip_bad:
            self.skipped += 1
            return
        where = f"row {row} (line {row + 2})" + (f", column {error.column}" if error.column else "")
        raise BadInput(f"{self.path}: {where}", error.why, "--skip-bad counts and skips such rows")


def _first_odd(header: list[str], fields: list[str]) -> str:
    return header[len(fields)] if len(fields) < len(header) else header[-1]
