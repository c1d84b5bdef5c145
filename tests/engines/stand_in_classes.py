"""Classes of an engine as recorded from its source, for stand-ins: modules, classes, methods and parameters
of one version, without behaviour. Standard library alone."""

from __future__ import annotations

import enum
import re
import sys
import types

BEHAVIOUR: dict[str, object] = {}
"""``Class.method`` to what a call of it does: the object first, then the parameters by name."""


def build(recorded: dict, version: str) -> dict[str, type]:
    """Classes by name, in modules of their own, with methods that have the recorded parameters. Class methods
    and static methods are left out."""
    built: dict[str, type] = {}
    of = recorded["versions"][version]["classes"]

    def make(place: str) -> type:
        if place in built:
            return built[place]
        module_name, name = place.split(":")
        signature = recorded["signatures"][of[place]]
        bases = tuple(make(base) for base in signature["bases"] if base in of)
        if name == "ForwardMode":
            names = [one for one in signature["attributes"] if one.isupper()]
            made = enum.IntEnum(name, names)
        else:
            space = dict.fromkeys(signature["attributes"])
            made = type(name, bases or (object,), {"__module__": module_name, **space})
            for method, words in signature["methods"].items():
                mark = words[: words.index("(")].strip()
                if not method.startswith("__") and mark in ("", "async"):
                    setattr(made, method, method_of(name, method, words))
        made.__module__ = module_name
        module = sys.modules.setdefault(module_name, types.ModuleType(module_name))
        setattr(module, name, made)
        built[place] = made
        return made

    for place in of:
        make(place)
    return {place.split(":")[1]: made for place, made in built.items()}


def method_of(owner: str, name: str, words: str) -> types.FunctionType:
    mark, inside = words[: words.index("(")].strip(), words[words.index("(") : words.rindex(")") + 1]
    parameters = [p.strip().rstrip("=").lstrip("*") for p in inside[1:-1].split(",")]
    given = ", ".join(f"{p}={p}" for p in parameters if p and p not in ("/", "self"))
    space: dict = {"BEHAVIOUR": BEHAVIOUR}
    waits = "await " if mark else ""
    exec(
        f"{mark} def {name}{re.sub(r'=(?=[,)])', '=None', inside)}:\n".lstrip()
        + f"    return {waits}BEHAVIOUR[{owner + '.' + name!r}](self, {given})",
        space,
    )
    return space[name]
