"""Debian packages that some tests need: installs what is missing where that can be done, else says which.

Nothing here is needed to run the tool. Only as root, with apt-get; a test whose program is missing skips
itself and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAMS = {
    "clang-14": "clang-14",
    "gcc": "gcc",
    "gdb": "gdb",
    "llvm-strip-14": "llvm-14",
    "node": "nodejs",
    "setpriv": "util-linux",
    "strip": "binutils",
    "unshare": "util-linux",
}
"""Package by program."""
UNPACKED = {"promtool": "prometheus", "amtool": "prometheus-alertmanager"}
"""The same, of packages that would start services: only unpacked, into a folder of the user's cache."""
FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latencyprism" / "debian"
LIMIT_S = 600


def missing() -> list[str]:
    """Packages whose programs are not on the path."""
    return sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})


def unpack() -> list[str]:
    """Packages of ``UNPACKED`` that are still missing after it."""
    left = []
    for program, package in UNPACKED.items():
        if shutil.which(program) or (FOLDER / "usr/bin" / program).exists():
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                get = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package]
                subprocess.run(get, cwd=folder, capture_output=True, timeout=LIMIT_S, check=True)
                FOLDER.mkdir(parents=True, exist_ok=True)
                for file in Path(folder).glob("*.deb"):
                    subprocess.run(["dpkg", "-x", str(file), str(FOLDER)], timeout=LIMIT_S, check=True)
        except (OSError, subprocess.SubprocessError):
            left.append(package)
    return left


def ensure() -> list[str]:
    """Install what is missing, if that is permitted; the packages that are still missing after it."""
    return sorted({*install(), *unpack()})


def install() -> list[str]:
    wanted = missing()
    if not wanted or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return wanted
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    get = ["apt-get", "-q", "-y", "install", "--no-install-recommends", *wanted]
    for command in (get, ["apt-get", "-q", "update"], get):
        try:
            done = subprocess.run(
                command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"{' '.join(command)}: {error}", file=sys.stderr)
            break
        if command is get and done.returncode == 0:
            break
    return missing()


def main() -> int:
    left = ensure()
    if left:
        print(f"missing, as root: apt-get install {' '.join(left)}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
