"""Reading TOML on every supported Python."""

from __future__ import annotations

import sys
from typing import Any

from latencyprism.errors import BadInput

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """``text`` as a table; BadInput naming ``source`` and the place if it is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"cannot read {source}", str(error), "mend the TOML there") from None
