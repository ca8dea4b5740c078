"""What a stage leaves behind, and its JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from stagekit.errors import StageError
from stagekit.files import write_text


Status = Literal["completed", "skipped", "stopped", "failed"]

OUT_OF_TIME = "max_duration"
"""The reason of a stage that ended because its time was up."""


@dataclass(frozen=True)
class StageResult:
    """The account of one stage. `artifacts` holds `policy` (a folder or hub id), and where there are any `adapter`,
    `reward_model` and `datasets` (name -> file); paths below the run folder are relative to it.
    `processes`: over how many the work was split; rows and steps are those of all, time and memory of the first."""

    name: str
    index: int
    type: str
    status: Status
    reason: str = ""
    digest: str | None = None
    artifacts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    samples_trained: int = 0
    samples_dropped: Mapping[str, int] = field(default_factory=dict)
    duration_seconds: float = 0.0
    peak_memory_bytes: int = 0
    processes: int = 1
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    description: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    max_duration_seconds: float | None = None
    """The time that the stage was given; None = as much as it needs."""
    run: Path = Path()

    @property
    def policy(self) -> str | None:
        """The model that later stages start from: an absolute path, or a hub id. None where there is none yet."""
        return self._place(self.artifacts.get("policy"))

    @property
    def reward_model(self) -> str | None:
        """The folder of the reward model that the stage trained, as an absolute path. None where it trained none."""
        return self._place(self.artifacts.get("reward_model"))

    @property
    def held_back(self) -> bool:
        """Whether the stage's gate did not let its model pass; it stands in `artifacts` as `held_back`."""
        return "held_back" in self.artifacts

    def dataset(self, name: str) -> Path:
        """The file of a dataset that the stage left.

        Raises:
            StageError: there is none of that name.
        """
        have = self.artifacts.get("datasets", {})
        if name not in have:
            raise StageError(f"stage {self.name!r} left no dataset {name!r}; it has {', '.join(have) or 'none'}")
        return Path(str(self._place(have[name])))

    def _place(self, text: Any) -> str | None:
        if text is None:
            return None
        inside = self.run / str(text)
        return str(inside.resolve()) if inside.exists() or str(text).startswith(f"{self.index:02d}-") else str(text)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do: completed, skipped, or out of its time budget."""
        return self.status in {"completed", "skipped"} or (self.status == "stopped" and self.reason == OUT_OF_TIME)

    def goes_on(self, max_duration_seconds: float | None) -> bool:
        """Whether the stage ran out of its time, and is now given more."""
        had, has = self.max_duration_seconds, max_duration_seconds
        ran_out = self.reason.partition(";")[0] == OUT_OF_TIME
        return ran_out and had is not None and (has is None or has > had)

    def write(self, path: Path) -> None:
        """Write the JSON, all or nothing: to a temporary file, fsync, rename."""
        plain = {key: value for key, value in asdict(self).items() if key != "run"}
        write_text(path, json.dumps(plain, indent=2, default=str) + "\n")

    @classmethod
    def read(cls, path: Path, run: Path) -> "StageResult | None":
        """The result in `path`; None where there is none.

        Raises:
            StageError: the file is no result of a stage.
        """
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(plain, dict):
                raise ValueError("no JSON object")
            known = {one.name for one in fields(cls)} - {"run"}
            plain["tags"] = tuple(plain.get("tags", ()))
            return cls(**{key: value for key, value in plain.items() if key in known}, run=run)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise StageError(f"{path}: is no result of a stage ({error}); delete it to run the stage again") from error


@dataclass(frozen=True)
class PipelineResult:
    """The results of all stages, in order."""

    folder: Path
    stages: tuple[StageResult, ...]

    def __getitem__(self, name: str) -> StageResult:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    @property
    def policy(self) -> str | None:
        """The model that the pipeline ends with."""
        return next((stage.policy for stage in reversed(self.stages) if stage.policy is not None), None)
