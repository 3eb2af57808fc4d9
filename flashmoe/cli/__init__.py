"""The `flashmoe` command.  Owns exit codes and the one-line form of errors, nothing else.

Answers go to stdout, everything else to stderr.  Exit 0 is success, 1 an error, 2 wrong usage, 130
an interrupt.  A subcommand is a file beside this one and a line in `_COMMANDS`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from flashmoe import __version__
from flashmoe.cli.bench import bench
from flashmoe.cli.doctor import doctor
from flashmoe.cli.generate import generate
from flashmoe.cli.inspect import inspect
from flashmoe.cli.pack import pack
from flashmoe.cli.plan import plan
from flashmoe.cli.trace import trace
from flashmoe.errors import FlashMoeError

__all__ = ["app", "main"]

_COMMANDS: tuple[Callable[..., Any], ...] = (generate, inspect, pack, bench, plan, doctor)

app = typer.Typer(
    name="flashmoe",
    help="Run Mixture-of-Experts language models larger than memory.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in _COMMANDS:
    app.command(_command.__name__)(_command)
app.add_typer(trace)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"flashmoe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")
    ] = False,
) -> None:
    pass


# typer brings its own copy of click since 0.26 and needs the real one before: take what it uses
_ClickException: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; never returns."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    if debug:
        args.remove("--debug")
    try:
        code = app(args or ["--help"], prog_name="flashmoe", standalone_mode=False)
        code = code if args else 2
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as e:
        if debug:
            raise
        code = getattr(e, "exit_code", 1)
        if type(e).__name__ != "NoArgsIsHelpError":  # a group without command showed its help
            print(f"flashmoe: {_message(e)}", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _message(error: Exception) -> str:
    if isinstance(error, _ClickException):
        text = str(error.format_message())  # type: ignore[attr-defined]
        return f"{text} (see flashmoe --help)"
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, FlashMoeError):
        text = str(error)
    else:
        text = f"internal error, {type(error).__name__}: {error} (--debug shows where)"
    return " ".join(text.split("\n"))
