"""The command: finds the verb's module, runs it, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from types import FrameType, ModuleType

from latencyprism import __version__
from latencyprism.errors import PrismError

VERBS = (
    "check", "watch", "record", "explain", "query", "replay", "slo", "inject", "ack", "detach", "demo",
    "bench",
)  # fmt: skip
ABOUT = ("-h", "--help", "--version")


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a verb as Ctrl-C does, so that no target is left half attached to."""


def entry() -> None:
    """Console script."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main(sys.argv[1:]))


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 the tool failed, 2 bad arguments, 3 target refused, 4 alerts (--fail-on-alert);
    130 and 143 after a Ctrl-C or a SIGTERM that the verb does not take for its ordinary end."""
    modules = {verb: _module(verb) for verb in VERBS if not argv or argv[0] in (verb, "-h", "--help")}
    parser = _parser(modules)
    if argv and argv[0] not in (*VERBS, *ABOUT):
        wrong = "a verb comes first, not" if argv[0].startswith("-") else "there is no verb"
        print(f"latencyprism: {wrong} {argv[0]!r}. Verbs: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "run"):
        parser.print_help()
        return 2
    try:
        code: int = arguments.run(arguments)
        return code
    except PrismError as error:
        print("latencyprism: " + ": ".join(part for part in (error.what, error.why) if part), file=sys.stderr)
        if error.remedy:
            print(f"  remedy: {error.remedy}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as end:
        return 128 + (signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT)
    except BrokenPipeError:
        # Whoever read our output has enough; a second error while flushing it would only be noise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("LATENCYPRISM_TRACEBACK"):
            raise
        print(
            f"latencyprism: {type(error).__name__}: {error}. This is a fault of the tool; "
            "LATENCYPRISM_TRACEBACK=1 shows where",
            file=sys.stderr,
        )
        return 1


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"latencyprism.cli.{verb}")


def _parser(modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="latencyprism",
        description="Watch a serving LLM engine, batch by batch, without restarting it.",
        epilog="latencyprism VERB --help tells about one verb.",
    )
    parser.add_argument("--version", action="version", version=f"latencyprism {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", dest="verb")
    for module in modules.values():
        sub = verbs.add_parser(module.NAME, help=module.HELP, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    entry()
