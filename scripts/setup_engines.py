"""Install the engines that the demo, the benchmarks and the tests run: ``setup_engines.py [ENGINE ...]``.

Each gets a virtual environment of its own in the user's cache folder. An engine that cannot be had on this
machine is named with its reason and is no failure; an unknown name is.
"""

from __future__ import annotations

import sys

from latencyprism.errors import BadInput
from latencyprism.lab.install import ENGINES, EngineUnavailable, ensure


def main(names: list[str]) -> int:
    for name in names or list(ENGINES):
        try:
            env = ensure(name)  # type: ignore[arg-type]  # ensure() itself refuses an unknown name
        except EngineUnavailable as missing:
            print(f"{name}: unavailable: {missing.reason}")
        except BadInput as wrong:
            print(wrong, file=sys.stderr)
            return 2
        else:
            print(f"{name}: {env.python}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
