"""How a stage's work is split over processes: how many there are, what is live, what TRL is told. Imports no torch.

`python -m stagekit.distributed STRATEGY` prints the TRL arguments of a strategy, also of one that is not built yet.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from stagekit.errors import ConfigError, Problem


if TYPE_CHECKING:
    from stagekit.pipeline import TrainingPipeline
    from stagekit.stage import TrainingStage


PROCESSES_WITHOUT_GPU = 2

_NEEDS_A_LAUNCH = (
    "'ddp' runs in several processes, and this is one alone; start it with `stagekit run`, with "
    "pipeline.run(isolate=True), or under torchrun"
)


def live_processes() -> int:
    """How many processes the launch has that this one is part of (torchrun, accelerate launch); 1 outside of any."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def splits(stage: "TrainingStage") -> bool:
    """Whether the stage runs in several processes."""
    return stage.distributed_strategy != "none"


def processes_of(stage: "TrainingStage", count: int) -> int:
    """Processes of the stage in a run of `count` for each stage that splits its work."""
    return count if splits(stage) else 1


def count_processes(pipeline: "TrainingPipeline", wanted: int | None = None, isolate: bool = False) -> int:
    """Processes for each stage that splits its work: `wanted`, or one per visible GPU, or 2 where there is none.

    Args:
        pipeline: What is to be run.
        wanted: `--num-processes`; None = by what the machine has.
        isolate: Whether stages run in children, which can be started as often as a stage says.

    Raises:
        ConfigError: what the stages declare is not what is live or can be started, or their sizes do not divide over
            so many; names each of them.
    """
    live, stages = live_processes(), [stage for stage in pipeline.stages if stage.enabled]
    problems = list(_differences(stages, live, isolate))
    if problems:
        raise ConfigError(problems)
    if wanted is not None and live > 1 and wanted != live:
        raise ConfigError(f"--num-processes: {wanted}, but this launch has {live} processes; leave it out")
    if not any(splits(stage) for stage in stages):
        if wanted is not None:
            raise ConfigError(
                "--num-processes: has no effect: no stage splits its work; set distributed_strategy: ddp in one"
            )
        return 1
    count = live if live > 1 else _count_to_start(wanted)
    problems = [
        Problem(f"{stage.path}.{one.path}", one.message)
        for stage in stages
        if splits(stage)
        for one in stage.method.problems_of_sizes(stage, count)
    ]
    if problems:
        raise ConfigError(problems)
    return count


def _differences(stages: "Iterable[TrainingStage]", live: int, isolate: bool) -> Iterable[Problem]:
    if live > 1 and isolate:
        yield Problem("isolate", f"starts processes of its own, and this launch has {live} already; drop it")
    for stage in stages:
        path = f"{stage.path}.distributed_strategy"
        if live > 1 and not splits(stage):
            yield Problem(
                path,
                f"'none' runs in one process, and this launch has {live}; set ddp, or use `stagekit run`, which "
                "starts as many as each stage needs",
            )
        elif live == 1 and splits(stage) and not isolate:
            yield Problem(path, _NEEDS_A_LAUNCH)


def _count_to_start(wanted: int | None) -> int:
    count = wanted if wanted is not None else visible_gpus() or PROCESSES_WITHOUT_GPU
    if count < 2:
        raise ConfigError(
            f"--num-processes: {count}, and distributed_strategy 'ddp' needs at least 2; drop the strategy on a "
            "machine with one GPU, or give more processes"
        )
    return count


def visible_gpus() -> int:
    """How many NVIDIA GPUs a process started here would see, by the driver: torch takes seconds to load."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([one for one in chosen.partition("-1")[0].split(",") if one.strip()])
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def configuration(strategy: str, processes: int, gpu: bool = True) -> dict[str, Any]:
    """The arguments of a TRL config, as plain data, that make it split the work by `strategy`.

    `parallelism_config` stands for accelerate's `ParallelismConfig(...)`. Everything in a DeepSpeed configuration that
    TRL's config says too is "auto", since the two may not differ.

    Raises:
        ConfigError: no TRL trainer has the strategy.
    """
    if strategy == "none":
        return {}
    if strategy == "ddp":
        return {"ddp_backend": "nccl" if gpu else "gloo"}
    if strategy == "fsdp":
        return {"fsdp": True, "fsdp_config": dict(_FSDP)}
    if strategy in _ZERO:
        return {"deepspeed": {**_DEEPSPEED, "zero_optimization": dict(_ZERO[strategy])}}
    if strategy == "tensor_parallel":
        return {"model_init_kwargs": {"tp_plan": "auto"}, "parallelism_config": {"tp_size": processes}}
    if strategy == "hybrid":
        sharded = {"dp_replicate_size": max(1, processes // 2), "dp_shard_size": 2}
        return {"fsdp": True, "fsdp_config": dict(_FSDP), "parallelism_config": sharded}
    raise ConfigError(f"distributed_strategy: {strategy!r}: no TRL trainer has it; use fsdp, zero3 or tensor_parallel")


_FSDP = {
    "version": 2,
    "reshard_after_forward": True,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "state_dict_type": "FULL_STATE_DICT",
    "cpu_ram_efficient_loading": True,
}

_DEEPSPEED = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
}

_ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto"},
    "zero3": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m stagekit.distributed STRATEGY")
    gpus = visible_gpus()
    try:
        print(json.dumps(configuration(sys.argv[1], gpus or PROCESSES_WITHOUT_GPU, gpu=gpus > 0), indent=2))
    except ConfigError as error:
        sys.exit(f"stagekit: error: {error}")
