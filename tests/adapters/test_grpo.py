"""GRPO and RLOO stages through pipelines on the tiny model: the bare trainers' numbers, resume, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from stagekit import ConfigError, StageError, TrainingStage
from stagekit.adapters import GRPO, RLOO, ProcessReward, Reward
from stagekit.groups import Generation, LoRA, Reference
from stagekit.plan import plan
from tests.running import CrashError, crash_at, lines, pipeline, run, same, stage
from tests.test_reward_models import pairs
from tests.trainers.test_process_reward import rule_rows


Write = Callable[..., Path]
SHORT = Generation(max_new_tokens=6)
METHODS: dict[str, Any] = {"grpo": GRPO, "rloo": RLOO}


def vowels(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """How many vowels an answer has, a quarter each."""
    return [sum(letter in "aeiou" for letter in turns[0]["content"]) / 4 for turns in completions]


@pytest.fixture
def data(write_rows: Write, sft_rows: list[Any]) -> dict[str, str]:
    return {
        "prompts": str(write_rows([{"prompt": row["prompt"]} for row in sft_rows], "prompts.jsonl")),
        "pairs": str(write_rows(pairs(32, 0), "pairs.jsonl")),
        "sft": str(write_rows(sft_rows, "sft.jsonl")),
    }


def of(kind: str, data: dict[str, str], reward: Any = vowels, **options: Any) -> TrainingStage:
    own = {key: options.pop(key) for key in list(options) if key in METHODS[kind].model_fields}
    method = METHODS[kind](reward=reward, **own)
    return stage(kind, data["prompts"], method, **{"generation": SHORT, "checkpoint_save_steps": 5, **options})


def bare(kind: str, data: dict[str, str], model: str, folder: Path, **options: Any) -> Any:
    """TRL's own trainer with the arguments of `tests.running.stage`."""
    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    given = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 1e-3,
        "logging_steps": 1, "lr_scheduler_type": "cosine", "warmup_steps": 0, "seed": 42, "full_determinism": True,
        "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "activation_checkpointing": False,
        "save_strategy": "no", "dataloader_pin_memory": False, "max_completion_length": 6, "num_generations": 4,
        "weight_decay": 0.01, "disable_dropout": True, "model_init_kwargs": {"dtype": "float32"}, **options,
    }  # fmt: skip
    made = trainer(
        model=model, reward_funcs=vowels, args=config(**given), train_dataset=Dataset.from_json(data["prompts"]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    made.train()
    return made


@pytest.mark.parametrize("kind", METHODS)
def test_a_stage_trains_as_the_bare_trainer_does(
    kind: str, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    run(tiny_model_path, tmp_path / "run", of(kind, data, warmup_ratio=0.0, log_gradient_norms=True))
    theirs = bare(kind, data, tiny_model_path, tmp_path / "bare").state.log_history
    ours = lines(tmp_path / "run" / f"01-{kind}")
    for key in ("loss", "reward", "grad_norm", "learning_rate"):
        assert [line[key] for line in ours if key in line] == [line[key] for line in theirs if key in line], key


@pytest.mark.parametrize("kind", METHODS)
def test_a_killed_stage_ends_in_the_same_bits(
    kind: str, data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"rollout_samples": 8, "epochs_per_batch": 2, "kl_penalty_coefficient": 0.02, "max_steps": 10}
    run(tiny_model_path, tmp_path / "whole", of(kind, data, **given))
    with monkeypatch.context() as patch:
        crash_at(patch, 7)
        with pytest.raises((CrashError, StageError)):
            run(tiny_model_path, tmp_path / "again", of(kind, data, **given))
    run(tiny_model_path, tmp_path / "again", of(kind, data, **given))
    assert same(tmp_path / "whole" / f"01-{kind}/policy", tmp_path / "again" / f"01-{kind}/policy")
    assert lines(tmp_path / "whole" / f"01-{kind}") == lines(tmp_path / "again" / f"01-{kind}")


@pytest.mark.parametrize("kind", METHODS)
def test_t45_the_adapter_of_a_reward_stage_scores(
    kind: str, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    first = stage("rm", data["pairs"], Reward(), max_steps=2, lora=LoRA(rank=4))
    result = run(tiny_model_path, tmp_path / "run", first, of(kind, data, "stage:rm", max_steps=2))
    assert "rewards/rm/mean" in lines(tmp_path / "run" / f"02-{kind}")[0]
    assert result[kind].policy is not None


def test_a_list_weighs_a_model_s_folder_a_function_and_a_reward_of_trl(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "rm")
    rewards = [
        {"source": str(tmp_path / "rm"), "weight": 0.5},
        vowels,
        {"source": "get_soft_overlong_punishment", "weight": 2.0, "name": "long",
         "options": {"max_completion_len": 4, "soft_punish_cache": 2}},
    ]  # fmt: skip
    run(tiny_model_path, tmp_path / "run", of("grpo", data, rewards, max_steps=2))
    for line in [one for one in lines(tmp_path / "run/01-grpo") if "reward" in one]:
        parts = [line[f"rewards/{name}/mean"] for name in ("rm", "vowels", "long")]
        assert line["reward"] == pytest.approx(0.5 * parts[0] + parts[1] + 2 * parts[2], abs=1e-5)
        assert parts[0] != 0 and parts[2] < 0


@pytest.mark.parametrize("kind", METHODS)
def test_a_process_reward_stage_scores_the_weakest_step(
    kind: str, data: dict[str, str], write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    steps = str(write_rows(rule_rows(8, 0), "steps.jsonl"))
    first = stage("prm", steps, ProcessReward(), max_steps=2, lora=LoRA(rank=4))
    run(tiny_model_path, tmp_path / "run", first, of(kind, data, "stage:prm", max_steps=2))
    scores = [line["rewards/prm/mean"] for line in lines(tmp_path / "run" / f"02-{kind}") if "reward" in line]
    assert scores
    assert all(0 < score < 1 for score in scores)


@pytest.mark.parametrize("kind", [*METHODS, "ppo", "online_dpo"])
def test_the_arguments_of_vllm_reach_the_config(kind: str, data: dict[str, str], tiny_model_path: str) -> None:
    given = {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.4, "vllm_enable_sleep_mode": True,
        "vllm_tensor_parallel_size": 2,
    }  # fmt: skip
    own = stage("rl", data["prompts"], {"type": kind, "reward": "format"}, generation=SHORT, trl=given)
    entry = plan(pipeline(tiny_model_path, Path("runs/x"), own))[0]
    found = {one["argument"]: (one["value"], one["source"]) for one in entry["arguments"]}
    assert {key: found[key] for key in given} == {key: (value, f"stages.rl.trl.{key}") for key, value in given.items()}
    with pytest.raises(ConfigError, match=r"trl\.vllm_gpu_memory: .* has no such argument; did you mean"):
        pipeline(tiny_model_path, Path("runs/x"), own.model_copy(update={"trl": {"vllm_gpu_memory": 0.4}}))


@pytest.mark.parametrize("kind", METHODS)
def test_the_reference_is_the_policy_that_came_in(
    kind: str, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    adapter = LoRA(rank=4)
    first = stage("sft", data["sft"], max_steps=2, lora=adapter)
    given = {"kl_penalty_coefficient": 0.1, "max_steps": 4, "warmup_ratio": 0.0, "learning_rate": 1e-2}
    given |= {"lora": adapter, "reference": Reference(update_every=3)}
    run(tiny_model_path, tmp_path / "run", first, of(kind, data, **given))
    kl = [line["kl"] for line in lines(tmp_path / "run" / f"02-{kind}") if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert abs(kl[2]) > 1e-5
    assert kl[3] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", GRPO.model_fields["loss"].annotation.__args__)  # type: ignore[union-attr]
def test_every_loss_trains(loss: str, data: dict[str, str], tiny_model_path: str, tmp_path: Path) -> None:
    sequence = {"trl": {"importance_sampling_level": "sequence"}} if loss == "luspo" else {}
    given = {"max_steps": 2, "relative_rewards": loss != "dr_grpo", **sequence}
    result = run(tiny_model_path, tmp_path / "run", of("grpo", data, loss=loss, **given))
    assert result["grpo"].steps == 2


def test_t18_verifiers_read_the_columns_of_the_data(write_rows: Write, tiny_model_path: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"{n} + 1 ="}], "solution": str(n + 1), "pattern": "unread"}
        for n in range(8)
    ]
    rewards = [
        {"source": "numeric", "options": {"column": "solution"}},
        {"source": "regex", "options": {"pattern": "e"}, "weight": 0.5},
    ]
    own = stage("rlvr", str(write_rows(rows, "sums.jsonl")), GRPO(reward=rewards), generation=SHORT, max_steps=4)
    run(tiny_model_path, tmp_path / "run", own)
    logged = [line for line in lines(tmp_path / "run/01-rlvr") if "reward" in line]
    assert any(line["rewards/regex/mean"] > 0 for line in logged)
    for line in logged:
        expected = line["rewards/numeric/mean"] + 0.5 * line["rewards/regex/mean"]
        assert line["reward"] == pytest.approx(expected, abs=1e-6)


def test_t46_spec_defaults_reach_the_trainer_only_where_they_are_set(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    def arguments(kind: str, **options: Any) -> dict[str, Any]:
        entry = plan(pipeline(tiny_model_path, tmp_path, of(kind, data, **options)))[0]
        return {one["argument"]: one["value"] for one in entry["arguments"]}

    for kind in METHODS:
        assert not {"beta", "num_iterations", "entropy_coef", "generation_batch_size"} & set(arguments(kind))
        given = {"kl_penalty_coefficient": 0.01, "epochs_per_batch": 4, "rollout_samples": 2048}
        found = arguments(kind, **given)
        assert (found["beta"], found["num_iterations"], found["generation_batch_size"]) == (0.01, 4, 2048)
    assert arguments("grpo", relative_rewards=False)["scale_rewards"] == "none"
    assert arguments("grpo", entropy_coefficient=0.01)["entropy_coef"] == 0.01


def test_the_plan_counts_whole_rollouts(data: dict[str, str], tiny_model_path: str, tmp_path: Path) -> None:
    own = of("grpo", data, max_steps=0, epochs=2, rollout_samples=24, epochs_per_batch=3)
    assert plan(pipeline(tiny_model_path, tmp_path / "plan", own))[0]["steps"] == 2 * 3 * 6 * 2
    result = run(tiny_model_path, tmp_path / "run", of("grpo", data, max_steps=0, epochs=2))
    assert result["grpo"].steps == 32  # 16 prompts, four completions each, four at a step, twice
    steps = plan(pipeline(tiny_model_path, tmp_path / "plan", of("grpo", data, max_steps=0, epochs=2)))[0]["steps"]
    assert steps == 32


@pytest.mark.parametrize(
    ("method", "given", "path", "message"),
    [
        ({"type": "grpo"}, {}, "method.reward", "missing"),
        ({"type": "grpo", "reward": "m:f", "group_size": 1}, {}, "method.group_size", "at least 2"),
        ({"type": "rloo", "reward": "m:f", "group_size": 3}, {}, "method.group_size", "8 completions (batch_size"),
        ({"type": "grpo", "reward": "m:f", "rollout_samples": 24, "group_size": 5}, {}, "method.group_size",
         "24 completions (rollout_samples)"),
        ({"type": "grpo", "reward": "m:f", "loss": "sapo", "clip_range": 0.1}, {}, "method.clip_range", "not clip"),
        ({"type": "grpo", "reward": "m:f"}, {"reference": {"mode": "copy"}}, "reference.mode", "has no effect"),
        ({"type": "rloo", "reward": "m:f"}, {"reference": {"mode": "precompute"}}, "reference.mode", "sampled anew"),
        ({"type": "rloo", "reward": "m:f", "entropy_coefficient": 0.1}, {}, "method.entropy_coefficient", "unknown"),
    ],
)  # fmt: skip
def test_t17_what_cannot_be_is_refused(method: Any, given: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingStage(name="s", training_data="x.jsonl", method=method, **given)
    found = [(problem.path, problem.message) for problem in caught.value.problems]
    assert any(where == path and message in text for where, text in found), found


@pytest.mark.parametrize(("size", "told"), [(8, None), (12, "leaves out 1 of 16 prompts: a rollout takes 3, whole")])
def test_t16_prompts_that_fill_no_rollout_are_told(
    size: int, told: str | None, data: dict[str, str], tiny_model_path: str, tmp_path: Path, capsys: Any
) -> None:
    one = of("grpo", data, batch_size=size, max_steps=1)
    pipeline(tiny_model_path, tmp_path / "run", one).run()
    said = capsys.readouterr().out
    assert "a rollout is" in said
    assert ("an epoch leaves out" in said) is (told is not None) and (told is None or told in said)
