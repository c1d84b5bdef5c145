"""What a reader will read is looked for in live classes alone; nothing of the target runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path

import pytest

from latencyprism.agent.probe.verify import changed_parameters, missing_fields, verified

SOURCE = Path(__file__).parents[2] / "src" / "latencyprism" / "agent" / "probe" / "verify.py"
RAN: list[str] = []


class Watchful(type):
    """A metaclass that would tell if its classes were asked anything."""

    def __getattribute__(cls, name: str) -> object:
        RAN.append(name)
        raise RuntimeError(name)


@dataclasses.dataclass
class Plain:
    declared: int
    with_default: int = 3


class Slotted:
    __slots__ = ("in_slot",)


class Base:
    def __init__(self) -> None:
        self.set_by_base = 1


class Derived(Base):
    def prepare(self) -> None:
        self.set_later = 2

    @property
    def computed(self) -> int:
        RAN.append("property")
        return 1

    def method(self, first: int, second: int = 0) -> None:
        pass


def decorated(function):  # type: ignore[no-untyped-def]
    @wraps(function)
    def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
        return function(*args, **kwargs)

    return wrapper


class Decorated:
    @decorated
    def method(self, first: int) -> None:
        pass


class Hostile(metaclass=Watchful):
    def __init__(self) -> None:
        self.there = 1


class Pretender:
    """An instance that claims to be a class."""

    @property
    def __class__(self):  # type: ignore[no-untyped-def]
        RAN.append("__class__")
        return type


@pytest.fixture(autouse=True)
def module() -> Iterator[None]:
    class Lazy(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            RAN.append(name)
            raise RuntimeError(name)

    made = Lazy("stand_in")
    held = (Plain, Slotted, Derived, Decorated, Hostile)
    made.__dict__.update((type.__dict__["__name__"].__get__(one), one) for one in held)
    made.__dict__["Pretender"] = Pretender()
    sys.modules["stand_in"] = made
    RAN.clear()
    yield
    del sys.modules["stand_in"]


def test_names_of_every_kind_are_found_and_the_rest_is_named() -> None:
    fields = {
        "stand_in:Plain": ["declared", "with_default", "gone"],
        "stand_in:Slotted": ["in_slot", "gone"],
        "stand_in:Derived": ["set_by_base", "set_later", "computed", "method", "gone"],
        "stand_in:Hostile": ["there", "gone"],
    }
    expected = ["Plain.gone", "Slotted.gone", "Derived.gone", "Hostile.gone"]
    assert missing_fields(fields) == expected
    assert RAN == []


def test_classes_and_modules_that_are_not_there_are_named_whole() -> None:
    fields = {
        "stand_in:Plain|Nowhere": ["declared"],
        "no.such.module:One": ["a"],
        "stand_in:Pretender": ["a"],
    }
    assert missing_fields(fields) == ["stand_in.Nowhere", "no.such.module.One", "stand_in.Pretender"]
    assert RAN == []


def test_parameters_that_moved_are_named() -> None:
    hooks = {
        "good": ("stand_in", "Derived", "method"), "moved": ("stand_in", "Derived", "method"),
        "wrapped": ("stand_in", "Decorated", "method"), "absent": ("stand_in", "Derived", "nothing"),
        "hostile": ("stand_in", "Hostile", "__init__"), "pretends": ("stand_in", "Pretender", "method"),
    }  # fmt: skip
    wanted = {
        "good": ("first",), "moved": ("second",), "wrapped": ("first",), "absent": ("a",), "hostile": (),
        "pretends": ("a",), "unknown": ("a",),
    }  # fmt: skip
    assert changed_parameters(hooks, wanted) == ["parameters of Derived.method"]
    assert RAN == []


def test_what_is_missing_comes_before_what_the_reader_says() -> None:
    reader = verified(lambda probe, config: ["hook"])
    assert reader(None, {"fields": {"stand_in:Plain": ["gone"]}}) == ["Plain.gone", "hook"]
    assert reader(None, {}) == ["hook"]


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.12", "3.13", "3.14"])
def test_it_is_the_same_on_other_interpreters(version: str, python_of: Callable[[str], str]) -> None:
    script = (
        SOURCE.read_text()
        + """
import json
class Plain:
    declared: int
    other: "str" = ""
    def __init__(self): self.assigned = 1
class Derived(Plain):
    late: int
print(json.dumps(missing_fields({"__main__:Derived": ["declared", "other", "assigned", "late", "gone"]})))
"""
    )
    done = subprocess.run(
        [python_of(version), "-c", script], capture_output=True, text=True, check=True, timeout=30
    )
    assert json.loads(done.stdout) == ["Derived.gone"]
