"""`shoulders harness ...`: lm-evaluation-harness' own command line, with our model in it."""

from __future__ import annotations

import sys

import typer

from shoulders.cli.common import quiet_libraries
from shoulders.reader.libraries import needed

# Every option is the harness's, `--help` too.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def harness(context: typer.Context) -> None:
    """Run lm-evaluation-harness: --model shoulders --model_args skill=DIR --tasks NAMES."""
    quiet_libraries()
    main = needed("lm_eval.__main__", "harness")
    from shoulders.evaluation.harness.registration import register

    register()
    sys.argv = ["lm_eval", *context.args]  # it reads its arguments from there alone
    main.cli_evaluate()
