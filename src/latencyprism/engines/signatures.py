"""Names and signatures of an engine's classes, read from its source without importing it, and what a pack's
range needs that is not there."""

from __future__ import annotations

import ast
import os
import stat
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from latencyprism.engines.packs import Hook, PackRange
from latencyprism.errors import BadInput

Source = Callable[[str], str | None]
"""Path of a module's file within the packages (``vllm/v1/request.py``) to its text; None if there is none."""

_SOURCE_LIMIT = 8_000_000
_BASES_LIMIT = 64
_PROPERTIES = ("property", "cached_property", "functools.cached_property")


@dataclass
class ClassSignature:
    """One class. ``bases``: places ``module:Class`` where known, else the name as written; ``methods``: name
    to its parameters in words, ``async (self, request, limit=, *, key=)``; ``attributes``: fields of the
    class body, properties, ``__slots__``, and all that methods assign to ``self``."""

    bases: list[str] = field(default_factory=list)
    methods: dict[str, str] = field(default_factory=dict)
    attributes: list[str] = field(default_factory=list)


Classes = dict[str, ClassSignature]


def folder_source(folder: Path) -> Source:
    """Of an unpacked tree, which may be a target's: only plain files of at most a few megabytes are read."""

    def read(path: str) -> str | None:
        if ".." in PurePosixPath(path).parts:
            return None
        try:
            descriptor = os.open(folder / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError):
            return None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _SOURCE_LIMIT:
            os.close(descriptor)
            return None
        with os.fdopen(descriptor, "rb") as file:
            return file.read(_SOURCE_LIMIT).decode("utf-8", "replace")

    return read


def wheel_source(wheel: Path) -> Source:
    """Of a wheel that was never installed. BadInput if it is not a zip file."""
    try:
        archive = zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise BadInput(f"cannot read {wheel}", str(error)) from None

    def read(path: str) -> str | None:
        try:
            return archive.read(path).decode("utf-8", "replace")
        except KeyError:
            return None

    return read


def hooks_of(entry: PackRange) -> list[Hook]:
    """Every function that a range hooks, deep ones too."""
    return [*entry.hooks.values(), *(hook for group in entry.deep.values() for hook in group)]


def places_of(entry: PackRange) -> set[str]:
    """Every class that a range names, as ``module:Class``."""
    places = {f"{module}:{owner}" for module, owners, _ in hooks_of(entry) for owner in owners.split("|")}
    for of in entry.fields.values():
        for place in of:
            module, _, owners = place.partition(":")
            places |= {f"{module}:{owner}" for owner in owners.split("|")}
    return places


def read_classes(source: Source, places: Iterable[str]) -> Classes:
    """The classes at ``places`` and their bases, as far as ``source`` has them."""
    found: Classes = {}
    modules: dict[str, _Module | None] = {}
    ahead = sorted(places)
    while ahead:
        place = ahead.pop()
        module_name, _, name = place.partition(":")
        if place in found:
            continue
        if module_name not in modules:
            modules[module_name] = _read_module(source, module_name)
        module = modules[module_name]
        if module is None or name not in module.classes:
            continue
        found[place] = module.signature(name)
        ahead += [base for base in found[place].bases if ":" in base]
    return found


def lacking(entry: PackRange, classes: Classes) -> list[str]:
    """What the range needs and these classes do not have, in words; empty when all is there."""
    missing: list[str] = []
    for name, (module, owners, method) in entry.hooks.items():
        for owner in owners.split("|"):
            parameters = _parameters(classes, f"{module}:{owner}", method)
            wanted = entry.parameters.get(name, ())
            if parameters is None:
                missing.append(f"hook {name}: {module}.{owner}.{method}")
            elif parameters[1 : len(wanted) + 1] != list(wanted):
                missing.append(f"parameters of {name}: {owner}.{method}({', '.join(parameters)})")
    for group in entry.deep.values():
        for module, owner, method in group:
            if _parameters(classes, f"{module}:{owner}", method) is None:
                missing.append(f"deep: {module}.{owner}.{method}")
    for of in entry.fields.values():
        for place, names in of.items():
            module, _, owners = place.partition(":")
            for owner in owners.split("|"):
                known = _names(classes, f"{module}:{owner}")
                missing += [f"field {module}.{owner}.{name}" for name in names if name not in known]
    return missing


def _family(classes: Classes, place: str) -> list[ClassSignature]:
    """A class and its bases, itself first."""
    ahead, found = [place], []
    seen: set[str] = set()
    while ahead and len(seen) < _BASES_LIMIT:
        one = ahead.pop(0)
        if one in classes and one not in seen:
            seen.add(one)
            found.append(classes[one])
            ahead += classes[one].bases
    return found


def _names(classes: Classes, place: str) -> set[str]:
    return {name for one in _family(classes, place) for name in (*one.attributes, *one.methods)}


def _parameters(classes: Classes, place: str, method: str) -> list[str] | None:
    """Positional parameters of a method, self first; None if it is not there."""
    for one in _family(classes, place):
        if method in one.methods:
            inside = one.methods[method].partition("(")[2].rstrip(")")
            names = [name.rstrip("=") for name in inside.split(", ") if name not in ("", "/")]
            end = next((at for at, name in enumerate(names) if name.startswith("*")), len(names))
            return names[:end]
    return None


# -- reading a module --------------------------------------------------------------------------------


@dataclass
class _Module:
    name: str
    classes: dict[str, ast.ClassDef]
    imported: dict[str, str]
    """Name in this module to the place ``module:Class`` it was imported from."""

    def signature(self, name: str) -> ClassSignature:
        node = self.classes[name]
        bases = [self._base(base) for base in node.bases]
        methods: dict[str, str] = {}
        attributes: set[str] = set()
        for item in node.body:
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                kinds = [ast.unparse(decorator) for decorator in item.decorator_list]
                if any(kind in _PROPERTIES or kind.endswith((".setter", ".getter")) for kind in kinds):
                    attributes.add(item.name)
                else:
                    methods[item.name] = _in_words(item, kinds)
                    attributes |= _assigned(item)
            else:
                attributes |= _declared(item)
        return ClassSignature(bases, dict(sorted(methods.items())), sorted(attributes))

    def _base(self, node: ast.expr) -> str:
        name = ast.unparse(node)
        if name in self.classes:
            return f"{self.name}:{name}"
        return self.imported.get(name, name)


def _read_module(source: Source, name: str) -> _Module | None:
    path = name.replace(".", "/")
    text, package = source(f"{path}.py"), name.rpartition(".")[0]
    if text is None:
        text, package = source(f"{path}/__init__.py"), name
    if text is None:
        return None
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    module = _Module(name, {}, {})
    top = name.partition(".")[0]
    ahead = list(tree.body)
    while ahead:
        node = ahead.pop(0)
        if isinstance(node, ast.ClassDef):
            module.classes.setdefault(node.name, node)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(package, node)
            if base.partition(".")[0] == top:
                for alias in node.names:
                    module.imported[alias.asname or alias.name] = f"{base}:{alias.name}"
        elif isinstance(node, ast.If | ast.Try):
            ahead = [*node.body, *node.orelse, *ahead]
    return module


def _absolute(package: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    parent = parts[: len(parts) - node.level + 1]
    return ".".join([*parent, *([node.module] if node.module else [])])


def _in_words(item: ast.FunctionDef | ast.AsyncFunctionDef, kinds: list[str]) -> str:
    given = item.args
    plain = [*given.posonlyargs, *given.args]
    bare = len(plain) - len(given.defaults)
    words = [argument.arg + ("=" if at >= bare else "") for at, argument in enumerate(plain)]
    if given.posonlyargs:
        words.insert(len(given.posonlyargs), "/")
    if given.vararg:
        words.append("*" + given.vararg.arg)
    elif given.kwonlyargs:
        words.append("*")
    words += [a.arg + ("" if d is None else "=") for a, d in zip(given.kwonlyargs, given.kw_defaults)]
    if given.kwarg:
        words.append("**" + given.kwarg.arg)
    marks: list[str] = [kind for kind in ("classmethod", "staticmethod") if kind in kinds]
    if isinstance(item, ast.AsyncFunctionDef):
        marks.append("async")
    return " ".join([*marks, f"({', '.join(words)})"])


def _assigned(item: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Names assigned to attributes of the first parameter."""
    first = next(iter([*item.args.posonlyargs, *item.args.args]), None)
    return {
        node.attr
        for node in ast.walk(item)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and first is not None
        and node.value.id == first.arg
    }


def _declared(item: ast.stmt) -> set[str]:
    """Names that a statement of a class body declares, ``__slots__`` spelled out."""
    if isinstance(item, ast.AnnAssign):
        return {item.target.id} if isinstance(item.target, ast.Name) else set()
    if not isinstance(item, ast.Assign):
        return set()
    names = {target.id for target in item.targets if isinstance(target, ast.Name)}
    if "__slots__" in names:
        names |= {
            node.value
            for node in ast.walk(item.value)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
    return names
