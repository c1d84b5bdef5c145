"""Unpack Debian's Python 3.14 into the user's cache, for the tests and benchmarks of attaching.

From Debian's development suite, through the Debian mirror that this machine's own package sources name, with
package lists in a folder of their own: nothing is installed, the machine's package state is not touched. The
interpreter runs with the C library it was built for: both are in one folder, with a starter in usr/bin.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SUITE = "sid"
PACKAGES = (
    *("python3.14-minimal", "libpython3.14-minimal", "libpython3.14-stdlib", "python3.14"),
    *("libc6", "libffi8", "zlib1g", "libexpat1", "libssl3t64", "libzstd1"),
)
ROOT = Path.home() / ".cache" / "latencyprism" / "python3.14"
STARTER = """#!/bin/sh
root={root}
libraries=$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu
export PYTHONHOME=$root/usr
exec "$root/{loader}" --library-path "$libraries" "$root/usr/lib/latencyprism/python3.14" "$@"
"""


def mirror() -> tuple[str, str]:
    """(address, key file or "") of the Debian mirror in this machine's sources; exits when there is none."""
    for path in sorted(Path("/etc/apt").glob("sources.list.d/*.sources")):
        text = path.read_text(errors="replace")
        address = re.search(r"^URIs:\s*(\S+/debian/?)\s*$", text, re.MULTILINE)
        key = re.search(r"^Signed-By:\s*(/\S+)", text, re.MULTILINE)
        if address:
            return address[1], key[1] if key else ""
    for path in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt").glob("sources.list.d/*.list"))):
        lines = path.read_text(errors="replace") if path.exists() else ""
        address = re.search(r"^deb\s+(?:\[[^]]*\]\s+)?(\S+/debian/?)\s", lines, re.MULTILINE)
        if address:
            return address[1], ""
    sys.exit("no Debian mirror in this machine's package sources")


def main() -> int:
    if (ROOT / "usr/bin/python3.14").exists() and works():
        print(ROOT / "usr/bin/python3.14")
        return 0
    state, packages = ROOT / "apt", ROOT / "packages"
    for folder in (state / "lists/partial", state / "cache/archives/partial", packages):
        folder.mkdir(parents=True, exist_ok=True)
    address, key = mirror()
    signed = f"[signed-by={key}] " if key else ""
    (state / "sources.list").write_text(f"deb {signed}{address} {SUITE} main\n")
    (state / "status").write_text("")
    options = [
        *("-o", f"Dir::Etc::SourceList={state}/sources.list", "-o", "Dir::Etc::SourceParts=/dev/null"),
        *(
            "-o",
            f"Dir::State={state}",
            "-o",
            f"Dir::State::Lists={state}/lists",
            "-o",
            f"Dir::Cache={state}/cache",
        ),
        *("-o", f"Dir::State::status={state}/status", "-o", "APT::Sandbox::User=root"),
        *(
            "-o",
            "Acquire::Languages=none",
            "-o",
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false",
        ),
    ]
    subprocess.run(["apt-get", *options, "-q", "update"], check=True)
    subprocess.run(["apt-get", *options, "-q", "download", *PACKAGES], check=True, cwd=packages)
    for package in sorted(packages.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(ROOT)], check=True)
    make_starter()
    if not works():
        return 1
    print(ROOT / "usr/bin/python3.14")
    return 0


def make_starter() -> None:
    """The real program moves aside; what stands in its place starts it with its own C library."""
    program, kept = ROOT / "usr/bin/python3.14", ROOT / "usr/lib/latencyprism/python3.14"
    loader = next(ROOT.glob("**/ld-linux-x86-64.so.2"))
    kept.parent.mkdir(parents=True, exist_ok=True)
    program.rename(kept)
    program.write_text(STARTER.format(root=ROOT, loader=loader.relative_to(ROOT)))
    program.chmod(0o755)


def works() -> bool:
    command = [
        str(ROOT / "usr/bin/python3.14"),
        "-c",
        "import ctypes, mmap, zlib, socket, json, sys; print(sys.version)",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.strip()[-400:], file=sys.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
