"""The project's words are true to its code: pages, links, flags, columns."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from latencyprism.cli.main import VERBS
from latencyprism.records import STEP_COLUMNS, Alert, Verdict
from latencyprism.records.verdict import CAUSES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])

_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<(?:img|a)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")
_COMMAND = re.compile(r"latencyprism ((?:[a-z]+)(?:\|[a-z]+)*)\b([^`\n#]*)")
_FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z-]*|-[a-z])(?![\w-])")
_OPTION_ROW = re.compile(r"^\| (`-[^|]*)\|", re.MULTILINE)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@cache
def flags_of(verb: str, what: str = "") -> frozenset[str]:
    """Flags that ``--help`` of a verb shows; of all its subcommands, or of ``what``."""
    module = importlib.import_module(f"latencyprism.cli.{verb}")
    parser = argparse.ArgumentParser(prog=f"latencyprism {verb}")
    module.add_arguments(parser)
    return frozenset(_FLAG.findall("\n".join(_helps(parser, what))))


def _helps(parser: argparse.ArgumentParser, what: str) -> Iterator[str]:
    yield parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                if not what or name in what.split("|"):
                    yield sub.format_help()


def commands(text: str) -> Iterator[tuple[str, str, str]]:
    """(verb, subcommand or "", the rest of the line) of every command line in a text."""
    for verb, rest in _COMMAND.findall(text):
        if verb in VERBS:
            what = re.match(r" ([a-z]+(?:\|[a-z]+)*)", rest) if verb == "bench" else None
            # A pipe begins another program's flags.
            yield verb, what[1] if what else "", rest.split(" | ")[0]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_page(verb: str) -> None:
    page = (DOCS / f"{verb}.md").read_text(encoding="utf-8")
    assert re.match(rf"# {verb}\b", page) and f"latencyprism {verb}" in page


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_of_a_verb_is_on_its_page(verb: str) -> None:
    page = (DOCS / f"{verb}.md").read_text(encoding="utf-8")
    told = set(_FLAG.findall(page))
    module = importlib.import_module(f"latencyprism.cli.{verb}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    missing = [
        "/".join(action.option_strings)
        for action in parser._actions
        if action.option_strings and "--help" not in action.option_strings
        and not told & set(action.option_strings)
        and "for symmetry" not in (action.help or "")
    ]  # fmt: skip
    assert not missing


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_in_a_table_of_a_page_exists(verb: str) -> None:
    page = (DOCS / f"{verb}.md").read_text(encoding="utf-8")
    told = {flag for row in _OPTION_ROW.findall(page) for flag in _FLAG.findall(row)}
    assert told <= flags_of(verb)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_command_line_has_only_flags_that_exist(page: Path) -> None:
    for verb, what, rest in commands(page.read_text(encoding="utf-8")):
        unknown = set(_FLAG.findall(rest)) - flags_of(verb, what)
        assert not unknown, f"latencyprism {verb} {what}: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for found in _LINK.findall(text):
        target = (found[0] or found[1]).partition("#")[0]
        if target and not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{target} in {page.name}"


def test_columns_and_fields_are_all_told() -> None:
    engines = (DOCS / "engines.md").read_text(encoding="utf-8")
    assert [c for c in STEP_COLUMNS if f"`{c}`" not in engines and c not in ("engine", "replica")] == []
    watch = (DOCS / "watch.md").read_text(encoding="utf-8")
    assert [f.name for f in dataclasses.fields(Alert) if f.name not in watch] == []
    architecture = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert [f.name for f in dataclasses.fields(Verdict) if f.name not in architecture] == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_causes_are_those_of_the_code(page: Path) -> None:
    families = "|".join(sorted({cause.partition(".")[0] for cause in CAUSES if "." in cause}))
    told = set(re.findall(rf"`((?:{families})\.[a-z_]+)`", page.read_text(encoding="utf-8")))
    files = {name for name in told if name.rpartition(".")[2] in ("py", "md", "toml")}
    assert told - files <= set(CAUSES)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_no_page_waits_for_a_figure(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "{{" not in text
    assert not re.search(r"(?<![\w.])/(?:work|root)/", text)
