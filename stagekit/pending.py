"""What is declared but has no effect yet: setting it is a ConfigError. The list only shrinks."""

from collections.abc import Mapping


PENDING: Mapping[str, str] = {
    "sync_batch_norm": "batch normalisation over several GPUs; decoder language models have no layer of it",
}
"""Flat name -> what is missing."""

PENDING_VALUES: Mapping[tuple[str, str], str] = {
    **{("distributed_strategy", value): "no run of it was ever checked (ddp works); `python -m stagekit.distributed "
       f"{value}` prints the TRL arguments that it would use" for value in (
        "fsdp", "zero1", "zero2", "zero3", "tensor_parallel", "hybrid")},
    ("distributed_strategy", "pipeline_parallel"): "no TRL trainer has pipeline parallelism; ddp works",
}  # fmt: skip
"""(path, value) of single values that are not built yet -> what is missing."""
