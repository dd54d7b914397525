"""Errors that a user can mend, and the exit codes of the programs."""

from __future__ import annotations

EXIT_USAGE = 64
EXIT_UNFIT = 69
EXIT_NOT_FINITE = 70
EXIT_WORKER = 71
EXIT_STORAGE = 73
EXIT_INPUT = 74
EXIT_STOPPED = 75
# The watchdog's: the same command goes on from the last checkpoint.
EXIT_HANG = 76


class UserError(Exception):
    """Something the user gave is wrong. The text is one clear sentence a problem: what, which
    value, what would be right. Programs print it without a traceback and exit with ``exit_code``.
    """

    exit_code = EXIT_USAGE


class ConfigError(UserError):
    """A key, a value, or a combination of values that cannot run; holds every problem found."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        # Else another process would be told of a problem a letter.
        return type(self), (self.problems,)


class InputError(UserError):
    """A file or checkpoint that is missing, damaged, or belongs to something else."""

    exit_code = EXIT_INPUT


class NotFinite(UserError):
    """A loss or gradient is NaN or infinite: the weights are not worth going on with."""

    exit_code = EXIT_NOT_FINITE


class StorageError(UserError):
    """A checkpoint could not be written: a full disk, a folder that went away. What was saved
    before is as it was, and the same command goes on from it once that is mended."""

    exit_code = EXIT_STORAGE


class WorkerDied(UserError):
    """A process that took part in the work is gone, as the system ends one where memory runs out.
    What was finished before is as it was, and the same command goes on from it."""

    exit_code = EXIT_WORKER


class Stopped(UserError):
    """A signal ended the run before its last step, on every process alike. What was trained is
    saved, and the same command goes on from there."""

    exit_code = EXIT_STOPPED
