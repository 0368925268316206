"""Every exception that zscore raises for its users.

ZscoreError
├── UsageError            a flag, a rubric, a file name: the command can't start (exit 2)
│   ├── RubricError       a rubric that can't be read or that the tokenizer can't express
│   └── ShardNotFoundError  an input argument that matches no shard
├── OutputError           the output can't be written, or isn't ours to write (exit 1)
│   ├── OutputLockedError   another run is writing there
│   └── OutputMismatchError what lies there was made with other settings
├── TableError            a scores file that can't be read or mixed
├── ModelError            a checkpoint that can't be loaded or scored with
├── SampleError           a picture handed to the library can't be scored, or trained on
├── EngineError           the engine broke; what was finished is kept
└── InterruptedRunError   Ctrl-C or SIGTERM; what was finished is kept (exit 130)

A bad sample in a shard is never an exception: it travels as a `Failure` (see `zscore.records`).
"""

from __future__ import annotations


class ZscoreError(Exception):
    """Base of all errors that the command line prints as one line."""

    exit_code = 1


class UsageError(ZscoreError, ValueError):
    """The call can't be carried out as it is written."""

    exit_code = 2


class RubricError(UsageError):
    """A rubric is malformed, or one of its levels isn't a single token of the model's tokenizer."""


class ShardNotFoundError(UsageError):
    """An input argument matches no shard."""


class OutputError(ZscoreError, OSError):
    """The output can't be written."""


class OutputLockedError(OutputError):
    """Another run is writing to the same output."""


class OutputMismatchError(OutputError):
    """The output holds results of another model, rubric, option or input."""


class TableError(ZscoreError, ValueError):
    """A scores file is missing, malformed, or can't be mixed with another."""


class ModelError(ZscoreError, ValueError):
    """A checkpoint can't be loaded, or can't be scored with."""


class SampleError(ZscoreError, ValueError):
    """A (prompt, picture) pair can't be scored (`Scorer.score`), or trained on."""


class EngineError(ZscoreError, RuntimeError):
    """The engine failed; every finished shard is kept."""


class InterruptedRunError(ZscoreError):
    """The user stopped the run."""

    exit_code = 130
