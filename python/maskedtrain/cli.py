"""The command ``maskedtrain``: one file of ``maskedtrain.commands`` for each of its commands.

Every error is one line and exit code 2 (tracebacks with ``--debug``); a run ended by a signal exits
with 128 + the signal's number.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence

import partial_kernels
from maskedtrain import commands
from maskedtrain.config import unknown_name
from maskedtrain.training.console import Console
from maskedtrain.training.memory import keep_freed_memory
from maskedtrain.training.signals import Interrupted

__all__ = ["main"]

ERROR_CODE = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``maskedtrain`` with these arguments (those of the process by default) and exit."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    keep_freed_memory()
    try:
        _run(args)
    except Interrupted as stop:
        print(f"maskedtrain: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print("maskedtrain: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # Whoever read the output has seen enough (head, less); nor is there one for the last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if debug:
            raise
        print(f"maskedtrain: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(ERROR_CODE)


def _run(args: list[str]) -> None:
    names = [module.name for module in pkgutil.iter_modules(commands.__path__)]
    names = [name for name in names if not name.startswith("_")]
    if not args or args[0] in ("-h", "--help"):
        print(_usage(names))
    elif args[0] == "--version":
        print(f"maskedtrain {partial_kernels.__version__}")
    elif args[0] not in names:
        raise unknown_name("command", args[0], names)
    else:
        command = importlib.import_module(f"{commands.__name__}.{args[0]}")
        command.main(args[1:], Console())


def _usage(names: Sequence[str]) -> str:
    lines = [
        "usage: maskedtrain COMMAND [options]    (maskedtrain COMMAND --help lists them)",
        "",
    ]
    for name in names:
        about = importlib.import_module(f"{commands.__name__}.{name}").__doc__ or ""
        lines.append(f"  {name:<10} {about.strip().splitlines()[0]}")
    return "\n".join([*lines, "", "  --debug    show the traceback of an error", "  --version"])


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    # An error of ours says what was wrong; any other is easier to report with its type.
    expected = (ValueError, OSError, ImportError, RuntimeError)
    return message if isinstance(error, expected) else f"{type(error).__name__}: {message}"
