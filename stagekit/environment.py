"""The process as it was before a stage: what TRL, transformers and datasets change for all that follows is undone."""

import contextlib
import logging
import os
import random
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stagekit.optimizers import forget_overrides


@contextlib.contextmanager
def stage_environment() -> Iterator[None]:
    """Undo what a stage changes for the whole process: environment variables, switches of torch and of the Hugging
    Face packages, random states (trap T10). Derived data goes to a temporary folder, not beside the data."""
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    before, flags, randomness = dict(os.environ), _torch_flags(), _random_states()
    bars = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    verbosity, caching = transformers_logging.get_verbosity(), datasets.is_caching_enabled()
    quantiser = logging.getLogger("bitsandbytes")
    level = quantiser.level
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["TQDM_DISABLE"] = "1"  # TRL shows a bar for the reference's log-probabilities
    quantiser.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\b")
            yield
    finally:
        forget_overrides()
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()
        if caching:
            datasets.enable_caching()
        transformers_logging.set_verbosity(verbosity)
        quantiser.setLevel(level)
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
        _restore_torch_flags(flags)
        _restore_random_states(randomness)


def _random_states() -> tuple[Any, Any, Any]:
    import numpy
    import torch

    return random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()


def _restore_random_states(states: tuple[Any, Any, Any]) -> None:
    import numpy
    import torch

    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.random.set_rng_state(states[2])


def _torch_flags() -> dict[str, Any]:
    import torch

    flags = {} if not hasattr(torch.backends, "fp32_precision") else {"fp32": torch.backends.fp32_precision}
    return {
        **flags,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "precision": torch.get_float32_matmul_precision(),
    }


def _restore_torch_flags(flags: Mapping[str, Any]) -> None:
    import torch
    from transformers.utils.import_utils import enable_tf32

    enable_tf32.cache_clear()  # it does nothing where it was called before, even if the switch was put back since
    if "fp32" in flags:
        backends: Any = torch.backends
        backends.fp32_precision = flags["fp32"]
    torch.use_deterministic_algorithms(flags["deterministic"], warn_only=flags["warn_only"])
    torch.backends.cudnn.deterministic = flags["cudnn.deterministic"]
    torch.backends.cudnn.benchmark = flags["cudnn.benchmark"]
    torch.set_float32_matmul_precision(flags["precision"])


def peak_memory() -> int:
    """Bytes: of the accelerator where there is one, else of the process (all stages so far, where they share it)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    for line in lines:  # on Linux ru_maxrss is that of the process that started this one, where that was larger
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
