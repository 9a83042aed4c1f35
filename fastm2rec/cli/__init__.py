"""The command line: prepare a log, train a model, evaluate it, ask it for recommendations.

    fastm2rec prepare      --dataset ml-100k --data DIR --out FOLDER
    fastm2rec embed-items  --dataset ml-100k --data DIR --out FILE
    fastm2rec train        --dataset ml-100k --data DIR --model m2rec --text FILE --out RUN
    fastm2rec evaluate     RUN
    fastm2rec recommend    RUN --history 50 181 121
    fastm2rec serve        --model RUN
    fastm2rec export       RUN --format onnx --out FILE

The options of `train` are the fields of the dataclasses in `fastm2rec.config` and `fastm2rec.training.config`, as
flags or as YAML. A failure that a message explains is one line on stderr and exit code 1, a wrong command line 2.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .._version import __version__
from ._arguments import PROGRAM

# Each is a module here with a function `run(arguments) -> exit code`; only the one that is asked for is imported.
COMMANDS = ("prepare", "embed-items", "tune-text", "train", "evaluate", "recommend", "serve", "export")

# Packages of the extras; where one is missing, its ImportError says what to install.
OPTIONAL = (
    "accelerate", "datasets", "faiss", "fastapi", "jsonargparse", "onnx", "onnxruntime", "onnxscript", "polars",
    "pooch", "prometheus_client", "sentence_transformers", "uvicorn", "yaml",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="|".join(COMMANDS), help="its options: COMMAND -h")
    # Only the words before a command's own are read here: a command reads the rest.
    command = parser.parse_args(arguments[:1]).command
    try:
        return importlib.import_module(f".{command.replace('-', '_')}", __name__).run(arguments[1:])
    except KeyboardInterrupt:
        print(f"{PROGRAM} {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone
        sys.stderr.close()
        return 1
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"{PROGRAM} {command}: error: {error}", file=sys.stderr)
        return 1


def _is_expected(error: Exception) -> bool:
    """Is it a failure that its message explains, rather than a bug that a traceback would?"""
    from ..impl import ImplementationError
    from ..storage import StorageError
    from ..vocab import UnknownItemError

    if isinstance(error, ImportError):
        return error.name in OPTIONAL
    if isinstance(error, ValueError | OSError | StorageError | UnknownItemError | ImplementationError):
        return True
    return type(error).__name__ in ("RunError", "DivergedError")  # of fastm2rec.training, which may not be importable
