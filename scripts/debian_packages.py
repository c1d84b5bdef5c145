"""Debian packages that some tests need: installs what is missing where that can be done, else says which.

Nothing here is needed to run the tool. Only as root, with apt-get; a test whose program is missing skips
itself and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

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
LIMIT_S = 600


def missing() -> list[str]:
    """Packages whose programs are not on the path."""
    return sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})


def ensure() -> list[str]:
    """Install what is missing, if that is permitted; the packages that are still missing after it."""
    wanted = missing()
    if not wanted or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return wanted
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "-q", "-y", "install", "--no-install-recommends", *wanted]
    for command in (install, ["apt-get", "-q", "update"], install):
        try:
            done = subprocess.run(
                command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"{' '.join(command)}: {error}", file=sys.stderr)
            break
        if command is install and done.returncode == 0:
            break
    return missing()


def main() -> int:
    left = ensure()
    if left:
        print(f"missing, as root: apt-get install {' '.join(left)}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
