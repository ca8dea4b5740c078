"""What can go wrong, as users see it.

StagekitError
  ConfigError      the pipeline as declared cannot run; found before anything is loaded (exit code 2)
  StageError       a stage failed while running (exit code 1)
  RunLocked        another process is working in the same run folder (exit code 3)
  Interrupted      the user asked to stop; the work is kept at a checkpoint (exit code 130)
"""

from collections.abc import Iterable
from typing import NamedTuple


class StagekitError(Exception):
    """Base of every error that stagekit raises on purpose."""


class Problem(NamedTuple):
    """One thing wrong in a declaration: where it stands (`stages.rl-cai.method.beta`), what it is, how to mend it."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(StagekitError):
    """The declaration cannot run. Carries every problem found, each with its path and the way out."""

    def __init__(self, problems: Iterable[Problem] | str, source: str | None = None) -> None:
        self.problems = (Problem("", problems),) if isinstance(problems, str) else tuple(problems)
        self.source = source
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.problems) == 1 and self.source is None:
            return str(self.problems[0])
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        head = f"{count} in {self.source}:" if self.source else f"{count}:"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


class StageError(StagekitError):
    """A stage could not be finished. The message names the stage, what was given and what to do."""


class RunLocked(StagekitError):
    """Another process holds the run folder."""


class Interrupted(StagekitError):
    """The run was asked to stop (Ctrl-C, SIGTERM); what was done is on disk."""
