"""`python -m tests.isolated FILE [key=value ...]`: run a pipeline file with each stage in a child, as the command line
does; and functions for such files."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from stagekit.errors import ConfigError, Interrupted, RunLocked, StageError
from stagekit.parse import read
from stagekit.pipeline import TrainingPipeline


def slow(model: Any, dataset: Any) -> dict[str, float]:
    """An evaluation that takes its time, so that a test can hit a process in its middle."""
    time.sleep(0.2)
    return {}


def reply(messages: Any) -> str:
    """A scripted model that keeps a log of what it was asked, and takes its time."""
    with Path(os.environ["ASKED"]).open("a") as file:
        file.write(json.dumps([message["content"] for message in messages]) + "\n")
    time.sleep(0.05)
    return f"Reply {len(messages)} to {messages[0]['content']}"


def main() -> int:
    pipeline = TrainingPipeline(**read(Path(sys.argv[1])))
    try:
        pipeline.run(isolate=True, num_processes=int(os.environ["PROCESSES"]) if "PROCESSES" in os.environ else None)
    except Interrupted as error:
        print(f"Interrupted: {error}", flush=True)
        return 130
    except RunLocked as error:
        print(f"RunLocked: {error}", flush=True)
        return 3
    except ConfigError as error:
        print(f"ConfigError: {error}", flush=True)
        return 2
    except StageError as error:
        print(f"StageError: {error}", flush=True)
        return 1
    assert "torch" not in sys.modules, "the parent imported torch"
    return 0


if __name__ == "__main__":
    sys.exit(main())
