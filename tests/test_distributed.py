"""Stages whose work is split over processes: the same numbers as in one, one account of it, and what is refused.
How they are started and end is in `test_launches.py`."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from transformers import TrainerControl, TrainerState

from stagekit import ConfigError, TrainingPipeline, TrainingStage
from stagekit.callbacks import Wrapped
from stagekit.digest import digests
from stagekit.distributed import configuration, count_processes, live_processes, visible_gpus
from stagekit.environment import stage_environment
from stagekit.errors import StageError
from stagekit.iterations import START
from stagekit.launch import exit_code
from stagekit.plan import as_text, plan
from stagekit.stage_options import Distributed
from stagekit.walk import _keep_texts
from tests.launched import torchrun
from tests.running import account, lines, losses, pipeline, stage, weights
from tests.test_isolation import ROOT


CLOSE = 1e-5
"""Largest difference of a loss, or of a weight, that the order of a sum in float32 explains here: losses around 10 and
weights around 1 after 8 steps; measured 2e-6 and 7e-7."""


@dataclass(frozen=True)
class Launched:
    """Stages run by two processes of torchrun, and the same stages run in this one with batches twice as large."""

    together: Path
    alone: Path
    said: list[dict[str, Any]]
    calls: list[str]
    calls_alone: list[str]

    def both(self, name: str) -> tuple[Path, Path]:
        return next(self.together.glob(f"*-{name}")), next(self.alone.glob(f"*-{name}"))


STAGES: dict[str, dict[str, Any]] = {
    "sft": {"callbacks": {"on_stage_start": "tests.launched:started", "on_batch_complete": "tests.launched:batch"}},
    "dpo": {"method": "dpo", "model": "tiny"},
    "distilled": {"method": {"type": "distillation", "teacher": "stage:sft", "alpha": 0.7}, "model": "tiny"},
    "unfrozen": {"use_gradual_unfreezing": True, "max_steps": ..., "epochs": 3},
    "measured": {
        "validation_data": "rows", "evaluation_steps": 2, "max_steps": 5, "logging_steps": 3,
        "custom_evaluation_function": "tests.launched:measure", "run_condition": "tests.launched:condition",
    },
    "lora": {
        "lora": {"rank": 4, "dropout": 0.0}, "gradient_accumulation_steps": 2, "max_steps": 4,
        "use_gradient_checkpointing": True,
        "custom_loss_function": "tests.launched:own_loss",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: str) -> Launched:
    from tests.conftest import QUESTIONS_AND_ANSWERS

    folder = tmp_path_factory.mktemp("launched")
    data = {"rows": [], "pairs": []}
    for question, better, worse in QUESTIONS_AND_ANSWERS:
        data["rows"].append({"prompt": question, "completion": better})
        data["pairs"].append({"prompt": question, "chosen": better, "rejected": worse})
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def declared(where: str, batch: int, **more: Any) -> TrainingPipeline:
        stages = []
        for name, options in STAGES.items():
            given = {"model": tiny_model_path, **options, **more, "batch_size": batch}
            given = {key: tiny_model_path if value == "tiny" else value for key, value in given.items()}
            if "validation_data" in given:
                given["validation_data"] = str(folder / "rows.jsonl")
            batch_of_stage = batch // given.get("gradient_accumulation_steps", 1)
            pairs = "pairs" if given.get("method") == "dpo" else "rows"
            stages.append(stage(name, str(folder / f"{pairs}.jsonl"), **{**given, "batch_size": batch_of_stage}))
        return pipeline(tiny_model_path, folder / where, *stages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALLS", str(folder / "calls-alone"))
        declared("alone", 8).run(quiet=True)
    calls = str(folder / "calls")
    out = torchrun(folder, declared("together", 4, distributed_strategy="ddp"), CALLS=calls)
    called = [(folder / name).read_text().splitlines() for name in ("calls", "calls-alone")]
    said = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return Launched(folder / "together", folder / "alone", said, *called)


@pytest.mark.parametrize("name", sorted(STAGES))
def test_two_processes_have_the_losses_of_one_with_batches_twice_as_large(name: str, launched: Launched) -> None:
    """The order of the rows too: another one would be another loss at every step."""
    together, alone = launched.both(name)
    assert losses(together) == pytest.approx(losses(alone), abs=CLOSE)
    assert len(losses(together)) == (1 if name == "measured" else account(together)["steps"])
    assert account(together)["metrics"]["train_loss"] == pytest.approx(
        account(alone)["metrics"]["train_loss"], abs=CLOSE
    )


@pytest.mark.parametrize("name", sorted(STAGES))
def test_two_processes_end_with_the_weights_of_one(name: str, launched: Launched) -> None:
    together, alone = (weights(folder / "policy") for folder in launched.both(name))
    assert together.keys() == alone.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("name", sorted(STAGES))
def test_the_account_counts_the_rows_and_steps_of_all_processes(name: str, launched: Launched) -> None:
    together, alone = (account(folder) for folder in launched.both(name))
    assert (together["processes"], alone["processes"]) == (2, 1)
    assert together["samples_trained"] == alone["samples_trained"] == 16
    assert together["steps"] == alone["steps"]
    assert json.loads((launched.both(name)[0] / "plan.json").read_text())["processes"] == 2


def test_only_the_first_process_writes(launched: Launched) -> None:
    names = [path.name for path in launched.together.rglob("*") if path.is_file()]
    own = sorted(path.name for path in launched.alone.rglob("*") if path.is_file())
    random = [name for name in names if name.startswith("rng_state")]
    assert sorted(name for name in names if name not in random) == [one for one in own if "rng_state" not in one]
    assert Counter(random)["rng_state_0.pth"] == Counter(random)["rng_state_1.pth"] == own.count("rng_state.pth")
    for name in STAGES:
        logged = [line["step"] for line in lines(launched.both(name)[0]) if "loss" in line]
        assert logged == sorted(set(logged)), "a line for each step, and not one for each process"


def test_functions_of_the_user_are_called_once_and_their_numbers_are_everybody_s(launched: Launched) -> None:
    calls, alone = (Counter(line.split()[0] for line in lines) for lines in (launched.calls, launched.calls_alone))
    assert calls == alone == {"started": 1, "condition": 1, "measure": calls["measure"], "batch": 8}
    assert {line.split()[-1] for line in launched.calls} == {"0"}
    heard = [float(line.split()[2]) for line in launched.calls if line.startswith("batch")]
    assert heard == pytest.approx(losses(launched.both("sft")[0]), abs=CLOSE)


def test_every_process_has_the_result(launched: Launched) -> None:
    assert sorted(one["rank"] for one in launched.said) == [0, 1]
    first, second = sorted(launched.said, key=lambda one: one["rank"])
    assert first == {**second, "rank": 0}
    assert first["policy"] == str(launched.together / "06-lora/policy")


def test_gradual_unfreezing_lets_ddp_look_for_frozen_weights_and_nothing_else_does(tiny_model_path: str) -> None:
    def told(**options: Any) -> Any:
        one = stage("s", "rows.jsonl", distributed_strategy="ddp", **options)
        (entry,) = plan(TrainingPipeline(model=tiny_model_path, stages=(one,)))
        return next(item["value"] for item in entry["arguments"] if item["argument"] == "ddp_find_unused_parameters")

    assert told(use_gradual_unfreezing=True) is True
    assert told() is False
    assert told(trl={"ddp_find_unused_parameters": True}) is True


def ddp(tiny_model_path: str, folder: Path, **options: Any) -> TrainingPipeline:
    return pipeline(tiny_model_path, folder, stage("s", str(folder / "rows.jsonl"), **options))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A launch, as its environment says; and no GPU but those that the test names."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def set_all(**names: str) -> None:
        for name, value in names.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_ddp_in_a_process_alone_names_the_ways_to_start_it(
    tiny_model_path: str, tmp_path: Path, environment: Callable[..., None]
) -> None:
    one = ddp(tiny_model_path, tmp_path, distributed_strategy="ddp")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    for inside in ({}, {"RANK": "0", "WORLD_SIZE": "1"}):
        environment(**inside)
        with pytest.raises(ConfigError, match=r"stages\.s\.distributed_strategy: 'ddp' runs in several processes"):
            one.run()
        with pytest.raises(
            ConfigError, match=r"`stagekit run`, with pipeline\.run\(isolate=True\), or under torchrun"
        ):
            count_processes(one)


def test_what_is_live_is_what_is_declared(
    tiny_model_path: str, tmp_path: Path, environment: Callable[..., None]
) -> None:
    environment(RANK="0", WORLD_SIZE="4")
    split, whole = ddp(tiny_model_path, tmp_path, distributed_strategy="ddp"), ddp(tiny_model_path, tmp_path)
    assert live_processes() == count_processes(split) == count_processes(split, 4) == 4
    with pytest.raises(ConfigError, match=r"stages\.s\.distributed_strategy: 'none' runs in one process.* has 4"):
        count_processes(whole)
    with pytest.raises(ConfigError, match="--num-processes: 3, but this launch has 4"):
        count_processes(split, 3)
    with pytest.raises(ConfigError, match="isolate: starts processes of its own"):
        count_processes(split, isolate=True)


def test_the_number_of_processes_is_the_users_or_that_of_the_gpus_or_two(
    tiny_model_path: str, tmp_path: Path, environment: Callable[..., None]
) -> None:
    split, whole = ddp(tiny_model_path, tmp_path, distributed_strategy="ddp"), ddp(tiny_model_path, tmp_path)
    assert count_processes(whole, isolate=True) == 1
    assert count_processes(split, isolate=True) == 2
    assert count_processes(split, 8, isolate=True) == 8
    environment(CUDA_VISIBLE_DEVICES="0,2,5")
    assert count_processes(split, isolate=True) == visible_gpus() == 3
    environment(CUDA_VISIBLE_DEVICES="0,-1,5")
    with pytest.raises(ConfigError, match=r"--num-processes: 1, and .* needs at least 2"):
        count_processes(split, isolate=True)
    with pytest.raises(ConfigError, match="--num-processes: has no effect: no stage splits its work"):
        count_processes(whole, 2, isolate=True)


def test_the_number_of_processes_is_part_of_what_a_result_depends_on(tiny_model_path: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    split, whole = ddp(tiny_model_path, tmp_path, distributed_strategy="ddp"), ddp(tiny_model_path, tmp_path)
    assert digests(split, 2) != digests(split, 3)
    assert digests(whole, 2) == digests(whole, 3)


def test_texts_do_not_depend_on_the_number_of_processes(tiny_model_path: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Name a fruit."}) + "\n")
    split = {"training_data": str(tmp_path / "rows.jsonl"), "distributed_strategy": "ddp"}
    stages = (
        TrainingStage(name="labels", method="ai_feedback", **split),
        TrainingStage(name="made", method="synthetic_data", **split),
        TrainingStage(name="learnt", method="constitutional", **split),
    )
    one = TrainingPipeline(model=tiny_model_path, stages=stages)
    two, three = digests(one, 2), digests(one, 3)
    assert {name: two[name] == three[name] for name in two} == {"labels": True, "made": True, "learnt": False}
    entries = plan(one, processes=2)
    assert "2 processes share out the texts that are written" in entries[0]["notes"]
    assert "2 processes of batch_size 8: an optimiser step takes 16 rows" in entries[2]["notes"]


def test_an_engine_that_takes_all_gpus_is_not_started_by_each_process() -> None:
    with pytest.raises(ConfigError, match=r"generation\.backend: 'vllm' takes the machine's GPUs .* use transformers"):
        TrainingStage(
            name="s", method="constitutional", training_data="x.jsonl", generation={"backend": "vllm"},
            distributed_strategy="ddp",
        )  # fmt: skip


def test_a_stage_that_changed_keeps_the_texts_of_its_iterations(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, old / "iteration-1", new):
        folder.mkdir()
        (folder / "journal.jsonl").write_text(folder.name)
    (old / "iteration-1" / START).write_text("{}")
    (old / "iteration-1" / "outcome.json").write_text("{}")
    _keep_texts(old, new)
    kept = {str(path.relative_to(new)): path.read_text() for path in new.rglob("*.*")}
    assert kept == {
        "journal.jsonl": "old",
        "iteration-1/journal.jsonl": "iteration-1",
        "iteration-1/start.json": "{}",
    }


def test_the_plan_counts_the_steps_of_all_processes(tiny_model_path: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a", "completion": "b"}) + "\n" for _ in range(10)))
    one = ddp(tiny_model_path, tmp_path, distributed_strategy="ddp", batch_size=2, max_steps=..., epochs=3)
    (entry,) = plans = plan(one, processes=2)
    assert (entry["processes"], entry["steps"]) == (2, 3 * 3)  # 5 batches are 3 for each process
    assert "2 processes of batch_size 2: an optimiser step takes 4 rows" in as_text(plans)
    assert plan(one, processes=1)[0]["steps"] == 5 * 3


@pytest.mark.parametrize("kind", ["evaluation", "custom"])
def test_a_type_that_one_process_does_alone_refuses_to_be_split(kind: str) -> None:
    given = {"type": kind, "function": "json:loads"} if kind == "custom" else kind
    with pytest.raises(ConfigError, match="distributed_strategy: has no effect here"):
        TrainingStage(name="s", method=given, validation_data="x.jsonl", distributed_strategy="ddp")
    with pytest.raises(ConfigError, match="distributed_strategy: has no effect here: is_evaluation_only"):
        TrainingStage(name="s", validation_data="x", is_evaluation_only=True, distributed_strategy="ddp")


def test_a_model_that_is_not_wrapped_as_declared_stops_the_stage(tiny_model: Any) -> None:
    """FSDP ran as DDP on a CPU, without a word."""
    callback = Wrapped("ddp")
    accelerator = SimpleNamespace(num_processes=2)
    callback.trainer = SimpleNamespace(model_wrapped=tiny_model, accelerator=accelerator)
    with pytest.raises(StageError, match="'ddp' was asked for, but the model is a LlamaForCausalLM in 2 processes"):
        callback.on_train_begin(SimpleNamespace(), TrainerState(), TrainerControl())


def failure(code: int, seconds: int) -> SimpleNamespace:
    return SimpleNamespace(exitcode=code, timestamp=seconds)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([failure(2, 100), failure(1, 101)], 2),
        ([failure(1, 100), failure(-9, 100)], 137),  # it was killed, and the other lost it
        ([failure(-11, 101), failure(1, 100)], 139),
        ([failure(1, 100), failure(-9, 130)], 1),  # torchrun killed it when it did not end
        ([failure(130, 100), failure(-15, 100)], 130),
    ],
)
def test_a_launch_ends_as_the_process_that_is_the_cause(failures: list[SimpleNamespace], expected: int) -> None:
    assert exit_code(failures) == expected


@pytest.mark.parametrize("strategy", get_args(Distributed))
def test_every_strategy_says_its_arguments_or_that_no_trainer_has_it(strategy: str) -> None:
    from trl import SFTConfig

    if strategy == "pipeline_parallel":
        with pytest.raises(ConfigError, match="no TRL trainer has it"):
            configuration(strategy, 2)
        return
    found = configuration(strategy, 2)
    assert set(found) <= {one.name for one in fields(SFTConfig)}
    json.dumps(found)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_t56_a_deepspeed_configuration_takes_everything_from_the_trainers(strategy: str, tiny_model: Any) -> None:
    """A value that is said twice and differs is an error of transformers, or wins without a word."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
    from trl import SFTConfig

    class Filled(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
        """As the trainer makes it, but where deepspeed is not installed too."""

        def __init__(self, config: dict[str, Any]) -> None:
            HfDeepSpeedConfig.__init__(self, config)
            self.mismatches: list[str] = []

    given = configuration(strategy, 2)["deepspeed"]
    args = SFTConfig(
        use_cpu=True, bf16=True, per_device_train_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.25,
        output_dir="out",
    )  # fmt: skip
    filled = Filled(given)
    filled.trainer_config_process(args)
    filled.trainer_config_finalize(args, tiny_model, 100)
    config = filled.config
    assert filled.mismatches == []
    assert "auto" not in json.dumps(config)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["train_batch_size"] == 15 * args.world_size
    assert (config["gradient_clipping"], config["bf16"], config["fp16"]) == (
        0.25,
        {"enabled": True},
        {"enabled": False},
    )
    assert config["zero_optimization"]["stage"] == int(strategy[-1])


@pytest.mark.parametrize("strategy", ["fsdp", "hybrid"])
def test_an_fsdp_configuration_has_accelerates_names(strategy: str) -> None:
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin
    from trl import SFTConfig

    found = configuration(strategy, 8)
    with stage_environment():  # it sets environment variables
        args = SFTConfig(output_dir="out", use_cpu=True, fsdp=found["fsdp"], fsdp_config=dict(found["fsdp_config"]))
    known = {one.name for one in fields(FullyShardedDataParallelPlugin)}
    assert set(args.fsdp_plugin_args) <= known
    asked = {key if key != "version" else "fsdp_version": value for key, value in found["fsdp_config"].items()}
    assert asked.items() <= args.fsdp_plugin_args.items()
    sizes = found.get("parallelism_config", {})
    assert ParallelismConfig(**sizes).total_size == (8 if sizes else 1)


def test_a_tensor_parallel_configuration_has_accelerates_names() -> None:
    from accelerate.parallelism_config import ParallelismConfig

    found = configuration("tensor_parallel", 4)
    assert ParallelismConfig(**found["parallelism_config"]).tp_size == 4
    assert found["model_init_kwargs"] == {"tp_plan": "auto"}


@pytest.mark.parametrize("strategy", sorted(set(get_args(Distributed)) - {"none", "ddp"}))
def test_a_strategy_that_is_not_built_is_refused_and_says_where_its_configuration_is(strategy: str) -> None:
    with pytest.raises(ConfigError, match=f"distributed_strategy: '{strategy}' is not built yet") as told:
        TrainingStage(name="s", training_data="x.jsonl", distributed_strategy=strategy)
    if strategy != "pipeline_parallel":
        assert f"`python -m stagekit.distributed {strategy}` prints" in str(told.value)
        ran = subprocess.run(
            [sys.executable, "-m", "stagekit.distributed", strategy], cwd=ROOT, capture_output=True, check=True
        )
        assert json.loads(ran.stdout) == configuration(strategy, visible_gpus() or 2, gpu=visible_gpus() > 0)
