# SPDX-License-Identifier: Apache-2.0
"""The scripts behind the tables: python -m experiments.NAME --help."""

import sys
from types import TracebackType

# What these scripts import and train_glue.py does not need
EXTRAS = ("gguf", "math_verify", "matplotlib", "peft", "PIL")


def one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """For sys.excepthook: a missing extra is named, with the way to it."""
    name = (getattr(error, "name", None) or "").split(".")[0]
    if kind is ModuleNotFoundError and name in EXTRAS:
        print(f'{name} is missing: pip install -e ".[experiments]"', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = one_line
