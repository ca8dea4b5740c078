"""What a stage emits, option by option: what the running half takes from the declaration, without training.

`EMITTED` is written by hand and says for every option where its value comes out, as `part name`:

| part | what it is |
|---|---|
| `argument` | an argument of the TRL config, as `stagekit plan` shows it; read back when it runs |
| `trainer` | the trainer's class and the arguments of its constructor |
| `adapter`, `quantisation` | what the trainer is given as `peft_config` and `quantization_config` |
| `hook`, `callback` | what is added to the trainer: the hook's value, the callback with its state |
| `rows` | the rows that the trainer, or the function of a custom stage, is given, in their order |
| `weights` | of the built trainer: which weights it trains in its first epochs |
| `saved` | the files that the built trainer saves |
| `begun` | what a run that dies while its data is preprocessed has done: calls, folder, `result.json` |
| `told` | what the function of a custom stage is called with, and the result that it makes |
| `texts` | what a constitutional stage writes |
| `sampled` | what a rejection sampling or self-play stage learns after its first sampling, and how often it trains |
| `made` | the rows and the instructions that a synthetic data stage leaves |
| `labelled` | the pairs of an AI feedback stage, with what its judge says of them |
| `started` | how the stage is started where stages that split their work have two processes |
| `deleted` | what is left of the stage's model once the next stage is done |

None of them is the declaration itself, so an option that is stored and not read emits nothing.
"""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stagekit import StageError, TrainingPipeline, TrainingStage
from stagekit.arguments import settings_of
from stagekit.job import Job
from stagekit.result import StageResult
from stagekit.runner import Task, _job, stage_folder
from stagekit.show import Show
from stagekit.stopping import Stop
from tests.every_option import Case, texts


ARGUMENTS = {
    "adam_beta1": "adam_beta1", "adam_beta2": "adam_beta2", "adam_epsilon": "adam_epsilon",
    "batch_size": "per_device_train_batch_size", "best_checkpoint_metric": "metric_for_best_model",
    "best_checkpoint_metric_maximize": "greater_is_better", "checkpoint_save_steps": "save_steps",
    "custom_metric_name": "metric_for_best_model", "data_shuffle_seed": "data_seed",
    "distributed_strategy": "ddp_find_unused_parameters", "dpo_beta": "beta",
    "distillation_alpha": "alpha", "distillation_layer_mapping": "layer_map",
    "distillation_temperature": "temperature",
    "entropy_coefficient": "entropy_coef", "gae_lambda": "gae_lambda", "grpo_group_size": "num_generations",
    "grpo_use_relative_rewards": "scale_rewards", "kl_penalty_coefficient": "beta", "ppo_clip_range": "epsilon",
    "ppo_epochs_per_batch": "num_iterations", "rollout_samples": "generation_batch_size",
    "value_function_coefficient": "vf_coef", "epochs": "num_train_epochs", "evaluation_steps": "eval_steps",
    "gradient_accumulation_steps": "gradient_accumulation_steps", "is_evaluation_only": "learning_rate",
    "learning_rate": "learning_rate", "logging_steps": "logging_steps",
    "max_checkpoints_to_keep": "save_total_limit", "max_gradient_norm": "max_grad_norm", "max_steps": "max_steps",
    "min_learning_rate": "lr_scheduler_kwargs", "mixed_precision_dtype": "bf16", "num_cycles": "lr_scheduler_kwargs",
    "optimizer_override": "optim", "options": "max_length", "preference_label_smoothing": "loss_weights",
    "random_seed": "seed", "reference_model_update_interval": "ref_model_sync_steps",
    "save_only_best": "load_best_model_at_end", "scheduler_power": "lr_scheduler_kwargs",
    "scheduler_type": "lr_scheduler_type", "share_reference_model": "precompute_ref_log_probs",
    "shuffle_data": "train_sampling_strategy", "update_reference_model": "sync_ref_model",
    "use_deterministic_algorithms": "full_determinism", "use_gradient_checkpointing": "activation_checkpointing",
    "use_intermediate_distillation": "match_hidden_states",
    "use_mixed_precision": "bf16", "warmup_ratio": "warmup_steps", "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
}  # fmt: skip

EMITTED: Mapping[str, str] = {
    **{option: f"argument {target}" for option, target in ARGUMENTS.items()},
    "callbacks": "begun called",
    "checkpoint_save_epochs": "callback epochs",
    "constitutional_principles": "texts",
    "contrastive_margin": "trainer",
    "critique_model": "texts",
    "critique_revision_rounds": "texts",
    "custom_evaluation_function": "hook evaluate",
    "custom_loss_function": "hook loss",
    "custom_training_function": "told",
    "data_mixing_ratios": "rows",
    "data_preprocessor": "rows",
    "description": "begun description",
    "early_stopping": "callback early",
    "enabled": "begun status",
    "freeze_base_model": "weights",
    "frozen_layers": "weights",
    "gradual_unfreezing_interval": "weights",
    "initial_loss_scale": "hook loss_scale",
    "log_gradient_norms": "hook hidden_logs",
    "log_learning_rate": "hook hidden_logs",
    "lora_alpha": "adapter lora_alpha",
    "lora_dropout": "adapter lora_dropout",
    "lora_rank": "adapter r",
    "lora_target_modules": "adapter target_modules",
    "max_duration": "callback stop",
    "max_training_samples": "rows",
    "merge_lora_after_training": "saved",
    "metadata": "begun metadata",
    "metrics_to_track": "hook tracked",
    "name": "begun folder",
    "qlora_bits": "quantisation",
    "reward_model": "trainer",
    "run_condition": "begun status",
    "save_checkpoint_after": "deleted",
    "tags": "hook tags",
    "teacher_model": "trainer",
    "trainable_layers": "weights",
    "training_data": "rows",
    "unfreeze_top_n_layers": "weights",
    "use_gradual_unfreezing": "weights",
    "use_lora": "adapter r",
    "use_qlora": "quantisation",
    "rejection_sampling_min_reward": "sampled",
    "rejection_sampling_n": "sampled",
    "rejection_sampling_top_k": "sampled",
    "self_play_iterations": "sampled",
    "self_play_responses_per_prompt": "sampled",
    "self_play_temperature": "sampled",
    "use_reference_model": "trainer",
    "validation_data": "rows",
}

OF_KIND: Mapping[tuple[str, str], str] = {
    ("data_shuffle_seed", "kto"): "rows",  # it reads in sequence, so that the rows are laid out before
    ("shuffle_data", "kto"): "rows",
    ("data_shuffle_seed", "custom"): "rows",
    ("shuffle_data", "custom"): "rows",
    ("random_seed", "custom"): "told",
    ("metadata", "custom"): "told",
    ("reward_model", "rejection_sampling"): "sampled",
    **{(option, "synthetic_data"): "made" for option in ("random_seed", "reward_model", "teacher_model")},
    ("data_shuffle_seed", "synthetic_data"): "rows",
    ("shuffle_data", "synthetic_data"): "rows",
    ("tags", "synthetic_data"): "begun tags",
    ("data_shuffle_seed", "ai_feedback"): "rows",  # it has no trainer that would shuffle
    ("shuffle_data", "ai_feedback"): "rows",
    **{
        (option, "ai_feedback"): "labelled"
        for option in ("random_seed", "use_mixed_precision", "mixed_precision_dtype")
    },
    **{("distributed_strategy", kind): "started" for kind in ("ai_feedback", "synthetic_data")},  # no TRL config
    ("tags", "ai_feedback"): "begun tags",
    ("tags", "evaluation"): "begun tags",  # no model, no model card
    ("tags", "custom"): "begun tags",
}
"""(option, stage type) that comes out elsewhere than in other types."""

SAMPLING = ("ppo", "grpo", "rloo", "online_dpo")
"""Types that learn from rewards."""
VOWELS = "tests.test_every_option:vowels"

CALLED: list[str] = []


def remember_the_call(stage: Any) -> None:
    CALLED.append(stage.name)


class Dies(Exception):
    """Ends a run where its data is preprocessed."""


def die(dataset: Any, split: str) -> Any:
    raise Dies("while the data is preprocessed")


def tell(context: Any) -> Mapping[str, Any]:
    (context.output_dir / "told.json").write_text(json.dumps([context.seed, dict(context.metadata)]))
    return {"metrics": {"rows": 0.0 if context.train_dataset is None else float(len(context.train_dataset))}}


@dataclasses.dataclass(frozen=True)
class Place:
    """A model, a folder, and the files that stages of each kind read, by the short words of the cases."""

    folder: Path
    model: str
    files: Mapping[str, str]

    def stage(self, kind: str, case: Case, given: Mapping[str, Any], **more: Any) -> TrainingStage:
        """A stage of `kind`, with what the case needs beside its option and the option's value."""
        options: dict[str, Any] = {"name": "stage", **self.least(kind), **case.shared, **given, **more}
        options.pop("then", None)
        if kind == "evaluation" and "evaluation_steps" not in given:
            options.pop("evaluation_steps", None)
        for key in ("training_data", "validation_data"):
            if options.get(key) == "mix":
                options[key] = {"a": self.data(kind, "rows"), "b": self.data(kind, "validation")}
            elif options.get(key) is not None:
                options[key] = self.data(kind, options[key])
        for key in ("critique_model", "model", "teacher_model"):
            if options.get(key) in {"other", "same"}:
                options[key] = self.other() if options[key] == "other" else self.model
        return TrainingStage(**{key: value for key, value in options.items() if value is not None or key in given})

    def least(self, kind: str) -> dict[str, Any]:
        """The least that a stage of `kind` needs."""
        if kind == "custom":
            return {"method": {"type": "custom", "function": "tests.option_pairs:tell"}}
        if kind == "evaluation":
            return {"method": "evaluation", "validation_data": "validation"}
        if kind == "rejection_sampling":
            writes = {"rejection_sampling_n": 6, "generation": {"max_new_tokens": 24}}
            return {"method": kind, "reward_model": "tests.answers:by_length", "training_data": "rows", **writes}
        if kind == "self_play":
            few = {"self_play_iterations": 1, "self_play_responses_per_prompt": 1}
            return {"method": kind, "training_data": "rows", **few, "generation": {"max_new_tokens": 24}}
        if kind == "synthetic_data":
            salad = {"type": kind, "instructions": 12, "examples": 2, "min_words": 1, "similarity": None}
            return {"method": salad, "training_data": "rows", "generation": {"max_new_tokens": 48}}
        if kind == "ai_feedback":
            any_label = {"type": kind, "tie_margin": 0.0}
            return {"method": any_label, "training_data": "rows", "generation": {"max_new_tokens": 64}}
        if kind == "self_rewarding":
            one = {"type": kind, "iterations": 1, "judge_by": "comparison", "judge": "tests.answers:likes_longer"}
            return {"method": one, "training_data": "rows", "generation": {"max_new_tokens": 24}}
        if kind == "online_dpo":
            return {"method": {"type": kind, "reward": VOWELS}, "training_data": "rows"}
        if kind in SAMPLING:
            return {"method": kind, "reward_model": VOWELS, "training_data": "rows"}
        if kind == "distillation":
            return {"method": kind, "teacher_model": "other", "training_data": "rows"}
        writes = {"generation": {"max_new_tokens": 24}} if kind == "constitutional" else {}
        return {"method": kind, "training_data": "rows", **writes}

    def other(self) -> str:
        """A second model of other weights."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = self.folder.parent / "other"
        if not path.exists():
            loaded = AutoModelForCausalLM.from_pretrained(self.model)
            for parameter in loaded.parameters():
                parameter.data.mul_(1.1)
            loaded.save_pretrained(path)
            AutoTokenizer.from_pretrained(self.model).save_pretrained(path)
        return str(path)

    def data(self, kind: str, word: str) -> str:
        if kind in {"constitutional", "rejection_sampling", "synthetic_data", *SAMPLING}:
            return self.files["prompts" if word == "rows" else "validation"]
        if kind in {"ai_feedback", "self_rewarding"}:
            return self.files["pairs" if word == "rows" else "pairs to validate"]
        name = {
            "process_reward": "steps",
            "sft": "rows",
            "distillation": "rows",
            "self_play": "rows",
            "evaluation": "rows",
            "custom": "rows",
        }.get(kind, "pairs")
        return self.files[name if word == "rows" else f"{name} to validate" if name != "rows" else "validation"]

    def task(self, *stages: TrainingStage) -> Task:
        pipeline = TrainingPipeline(name="t", model=self.model, output_dir=self.folder, stages=stages)
        task = Task(pipeline, 0, self.folder, "digest", ())
        task.folder.mkdir(parents=True, exist_ok=True)
        return task

    def job(self, stage: TrainingStage) -> Job:
        return _job(self.task(stage), Stop(), Show(quiet=True), time.monotonic())


def part_of(option: str, kind: str) -> str:
    return OF_KIND.get((option, kind), EMITTED[option])


def emission(place: Place, stage: TrainingStage, part: str) -> Any:
    """The named part of what the stage emits."""
    part, _, name = part.partition(" ")
    return PARTS[part](place, stage, name)


def started(place: Place, stage: TrainingStage, name: str) -> Any:
    from stagekit.children import _command
    from stagekit.distributed import processes_of

    return _command(dataclasses.replace(place.task(stage), processes=processes_of(stage, 2)))


def argument(place: Place, stage: TrainingStage, name: str) -> Any:
    return {setting.target: setting.value for setting in settings_of(stage)}.get(name, "not given")


def trainer(place: Place, stage: TrainingStage, name: str) -> Any:
    arguments = dict(stage.method.trainer_arguments(place.job(stage)))
    return stage.method.trainer_for(stage), {key: arguments[key] for key in arguments if not key.startswith("cache")}


def adapter(place: Place, stage: TrainingStage, name: str) -> Any:
    from stagekit.building import _adapter_arguments

    config = _adapter_arguments(place.job(stage)).get("peft_config")
    return None if config is None else getattr(config, name)


def quantisation(place: Place, stage: TrainingStage, name: str) -> Any:
    from stagekit.building import _adapter_arguments

    config = _adapter_arguments(place.job(stage)).get("quantization_config")
    return None if config is None else config.to_dict()


def hook(place: Place, stage: TrainingStage, name: str) -> Any:
    from stagekit.building import _callbacks, _hooks, _what_is_tracked

    job = place.job(stage)
    tracked = _what_is_tracked(job)
    callbacks = _callbacks(job, None, False, tracked)
    return getattr(_hooks(job, tracked, callbacks["stop"], callbacks.get("events")), name)


def callback(place: Place, stage: TrainingStage, name: str) -> Any:
    from stagekit.building import _callbacks, _what_is_tracked

    job = place.job(stage)
    found = _callbacks(job, None, False, _what_is_tracked(job)).get(name)
    of_the_job = {"_stop", "_started"}
    return found and {key: value for key, value in vars(found).items() if key not in of_the_job}


def rows(place: Place, stage: TrainingStage, name: str) -> Any:
    job = place.job(stage)
    sets = [job.train_dataset, job.eval_dataset]
    return [None if one is None else stage.method.rows(job, one).to_list() for one in sets]


def trained(place: Place, stage: TrainingStage) -> tuple[Job, Any]:
    """The stage's trainer as it is built; one that writes what it learns gets rows that are there."""
    from datasets import load_dataset

    from stagekit.building import build

    job = place.job(stage)
    learns = {"constitutional": "rows", "rejection_sampling": "rows", "self_play": "pairs", "self_rewarding": "pairs"}
    if stage.method.type in learns:
        written = load_dataset("json", data_files=place.files[learns[stage.method.type]], split="train")
        job = dataclasses.replace(job, train_dataset=written)
    return job, build(job, None)[0]


def weights(place: Place, stage: TrainingStage, name: str) -> Any:
    from transformers import TrainerControl, TrainerState

    _, built = trained(place, stage)
    if built.hooks.before_optimizer is not None:
        built.hooks.before_optimizer()
    found = []
    for epoch in (0, 1, 2):
        state = TrainerState(epoch=float(epoch))
        built.callback_handler.call_event("on_epoch_begin", built.args, state, TrainerControl())
        found.append(sorted(name for name, weight in built.model.named_parameters() if weight.requires_grad))
    return found


def saved(place: Place, stage: TrainingStage, name: str) -> Any:
    import shutil

    from stagekit.training import _save

    job, built = trained(place, stage)
    shutil.rmtree(job.folder)
    job.folder.mkdir()
    _save(job, built)
    return sorted(str(path.relative_to(job.folder)) for path in job.folder.rglob("*") if path.is_file())


def begun(place: Place, stage: TrainingStage, name: str) -> Any:
    """A run in a folder of its own, for as long as the data are not there yet."""
    import shutil

    run = place.folder / "begun"
    shutil.rmtree(run, ignore_errors=True)
    CALLED.clear()
    pipeline = TrainingPipeline(name="t", model=place.model, output_dir=run, stages=(stage,))
    try:
        pipeline.run(quiet=True)
    except StageError as error:
        assert "while the data is preprocessed" in str(error), error
    (folder,) = run.glob("01-*")
    result = json.loads((folder / "result.json").read_text())
    return {"called": list(CALLED), "folder": folder.name, **result}[name]


def told(place: Place, stage: TrainingStage, name: str) -> Any:
    job = place.job(stage)
    outcome = stage.method.run(job)
    written = job.folder / "told.json"
    return outcome.metrics, written.read_text() if written.exists() else None


def written_texts(place: Place, stage: TrainingStage, name: str) -> Any:
    job = place.job(stage)
    shutil.rmtree(job.folder)
    job.folder.mkdir()
    stage.method.prepare(job)
    return texts(job.folder)


def made_rows(place: Place, stage: TrainingStage, name: str) -> Any:
    job = place.job(stage)
    shutil.rmtree(job.folder)
    job.folder.mkdir()
    with contextlib.suppress(StageError):  # a teacher of noise may write nothing that is kept; what it wrote is there
        stage.method.run(job)
    return [(job.folder / "data" / f"{made}.jsonl").read_text() for made in stage.method.makes]


def sampled_rows(place: Place, stage: TrainingStage, name: str) -> Any:
    job = place.job(stage)
    shutil.rmtree(job.folder)
    job.folder.mkdir()
    return sampled(job).train_dataset.to_list(), stage.method.trainings()


def labelled(place: Place, stage: TrainingStage, name: str) -> Any:
    job = place.job(stage)
    shutil.rmtree(job.folder)
    job.folder.mkdir()
    stage.method.run(job)
    return (job.folder / "data" / "labels.jsonl").read_text()


def sampled(job: Job) -> Job:
    """The job of a first iteration, of a type that samples what it learns; of another type as it is."""
    from stagekit import rejection, self_rewarding, spin

    method: Any = job.stage.method
    prepare = {
        "self_rewarding": lambda: self_rewarding._prepare(job, 1, method),
        "rejection_sampling": lambda: rejection._prepare(job, 1, method),
        "self_play": lambda: spin._prepare(job, 1, method, job),
    }
    return prepare.get(method.type, lambda: job)()


def deleted(place: Place, stage: TrainingStage, name: str) -> Any:
    from stagekit.walk import _delete_unwanted

    after = TrainingStage(**place.least("sft") | {"name": "after", "training_data": place.files["rows"]})
    pipeline = place.task(stage, after).pipeline
    artifact = stage.method.artifact
    results = []
    for index, one in enumerate(pipeline.stages):
        folder = stage_folder(place.folder, index, one.name)
        (folder / one.method.artifact).mkdir(parents=True, exist_ok=True)
        made = {one.method.artifact: f"{folder.name}/{one.method.artifact}"}
        kind = one.method.type
        results.append(StageResult(one.name, index + 1, kind, "completed", artifacts=made, run=place.folder))
    _delete_unwanted(pipeline, place.folder, results)
    return (stage_folder(place.folder, 0, stage.name) / artifact).exists()


PARTS: Mapping[str, Callable[[Place, TrainingStage, str], Any]] = {
    "argument": argument, "trainer": trainer, "adapter": adapter, "quantisation": quantisation, "hook": hook,
    "callback": callback, "rows": rows, "weights": weights, "saved": saved, "begun": begun, "told": told,
    "texts": written_texts, "sampled": sampled_rows, "labelled": labelled, "made": made_rows, "deleted": deleted,
    "started": started,
}  # fmt: skip


STEP_ROWS = [
    {"prompt": f"{n} + 2?", "completions": [f"{n} and 2", f"It is {n + 2 + n % 2}."], "labels": [True, n % 2 == 0]}
    for n in range(1, 17)
]


def write_files(folder: Path, sft: list[Any], pairs: list[Any]) -> dict[str, str]:
    """The files that the words of `Place` stand for."""
    content = {
        "rows": sft, "validation": sft[::-1][:6], "pairs": pairs, "pairs to validate": pairs[::-1][:6],
        "steps": STEP_ROWS, "steps to validate": STEP_ROWS[::-1][:6],
        "prompts": [{"prompt": row["prompt"]} for row in sft[:10]],
    }  # fmt: skip
    found = {}
    for name, lines in content.items():
        path = folder / f"{name.replace(' ', '-')}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[name] = str(path)
    return found
