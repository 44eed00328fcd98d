"""`shoulders`: the commands, and how errors reach the user.

Heavy imports happen inside the commands, so that `shoulders --help` answers at once.
"""

from __future__ import annotations

import contextlib
import sys
from io import TextIOWrapper
from itertools import pairwise
from typing import Annotated, Any

import typer

from shoulders import __version__
from shoulders.cli import (
    ask,
    bench,
    compare,
    demo,
    evaluate,
    generate,
    harness,
    index,
    info,
    serve,
    train,
)
from shoulders.cli.common import quiet_imports
from shoulders.errors import InterruptedBenchmark, InterruptedTraining, ShouldersError

# Wrong usage of the command line. New versions of typer carry click inside them, old ones
# import it: the class is reached through what typer exports.
_Usage: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="shoulders",
    help="One frozen language model, many skills: train small networks around it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("harness", context_settings=harness.SETTINGS)(harness.harness)
app.command("generate")(generate.generate)
app.command("index")(index.index)
app.command("info")(info.info)
app.command("ask")(ask.ask)
app.command("serve")(serve.serve)
app.command("compare")(compare.compare)
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"shoulders {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; exit 2 with one line for what a user can mend, 130 on Ctrl-C."""
    quiet_imports()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal of few letters shows others as codes
            stream.reconfigure(errors="backslashreplace")
    # With `--json -` standard output is the JSON's alone: tables and answers go to standard error.
    json_only = "--json=-" in sys.argv or ("--json", "-") in pairwise(sys.argv)
    try:
        with contextlib.redirect_stdout(sys.stderr) if json_only else contextlib.nullcontext():
            code = app(standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C, without a word
            _fail("stopped; nothing was left half-written", 130)
        sys.exit(code)
    except typer.Abort:
        _fail("stopped", 130)
    except _Usage as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(error.exit_code)
        _fail(error.format_message(), error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped; nothing was left half-written", 130)
    except ShouldersError as error:
        stopped = isinstance(error, (InterruptedTraining, InterruptedBenchmark))
        _fail(str(error), 130 if stopped else 2)
    except OSError as error:
        # The disk filled up or a file vanished: the user's to mend, not a defect.
        _fail(f"{error.filename or 'file system'}: {error.strerror or error}", 2)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)
