"""What stagekit leans on in transformers, TRL and accelerate and their documentation does not promise: one test each.

A new version that breaks one of these breaks it here, by name, and not in a training somewhere.
"""

import inspect
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOTrainer, RewardTrainer, SFTConfig, SFTTrainer

from stagekit.hooks import Hooked, Hooks


TRAINERS = (SFTTrainer, DPOTrainer, KTOTrainer, RewardTrainer)

SIGNATURES: dict[str, list[str]] = {
    "log": ["logs", "start_time"],
    "evaluation_loop": [
        "dataloader",
        "description",
        "prediction_loss_only",
        "ignore_keys",
        "metric_key_prefix",
    ],
    "_determine_best_metric": ["metrics", "trial"],
    "set_initial_training_values": ["args", "dataloader"],
    "create_optimizer": ["model"],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "_build_accelerator_args": ["kwargs"],
    "_finalize_training": ["trial", "num_train_samples", "start_time"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "_prepare_inputs": ["inputs"],
    "compute_loss_context_manager": [],
    "get_tp_size": [],
}
"""Methods that stagekit overrides or calls -> their parameters."""

Seen = dict[str, list[Any]]


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "logging_steps": 3,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }


def watched(base: Any, seen: Seen) -> Any:
    """A trainer that notes every call of what stagekit overrides: name, arguments by name, and what came back."""

    def watching(name: str) -> Any:
        original = getattr(base, name)
        signature = inspect.signature(original)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = dict(signature.bind(self, *args, **kwargs).arguments)
            found = original(self, *args, **kwargs)
            seen.setdefault(name, []).append((given, found))
            return found

        return call

    names = [*SIGNATURES, "training_step", "create_model_card"]
    return type("Watched", (base,), {name: watching(name) for name in names if hasattr(base, name)})


class Watch(TrainerCallback, ExportableState):  # type: ignore[misc]
    """The trainer's own sums at each checkpoint, as `callbacks.Totals` reads them."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.totals: list[tuple[int, float, float, int, float, dict[str, Any]]] = []
        self.order: list[str] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        one = self.trainer
        window, before, logged = float(one._tr_loss), one._total_loss_scalar, one._globalstep_last_logged
        self.totals.append((state.global_step, window, before, logged, one._total_train_tokens, dict(one._metrics)))
        self.order.append("save")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.order.append("step")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.order.append("epoch")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert kwargs["optimizer"] is not None, "the optimiser is made before training begins"
        self.order.append("begin")

    def state(self) -> dict[str, Any]:
        return {"args": {"kept": 7}, "attributes": {}}


@pytest.fixture
def rows(sft_rows: list[Any]) -> Dataset:
    return Dataset.from_list(sft_rows)


@pytest.fixture
def ran(rows: Dataset, tiny_model_path: str, tmp_path: Path) -> tuple[Any, Seen, Watch]:
    """A bare TRL training of four steps, evaluated and saved every second one."""
    seen: Seen = {}
    watch = Watch()
    trainer = watched(SFTTrainer, seen)(
        model=tiny_model_path,
        args=SFTConfig(**common(tmp_path)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.train()
    return trainer, seen, watch


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_t50_a_method_has_the_parameters_that_stagekit_knows(name: str, trainer: Any) -> None:
    assert list(inspect.signature(getattr(trainer, name)).parameters)[1:] == SIGNATURES[name]


@pytest.mark.parametrize("trainer", [DPOTrainer, KTOTrainer], ids=lambda trainer: trainer.__name__)
def test_t50_references_are_precomputed_with_rows_name_and_size(trainer: Any) -> None:
    parameters = list(inspect.signature(trainer._precompute_ref_logps).parameters)
    assert parameters == ["self", "dataset", "name", "batch_size"]


@pytest.mark.parametrize("trainer", [DPOTrainer, KTOTrainer], ids=lambda trainer: trainer.__name__)
def test_precomputed_numbers_go_through_the_file_that_the_dataset_names(trainer: Any) -> None:
    """Of several processes the first writes it, and the others would look in temporary folders of their own."""
    source = inspect.getsource(trainer._precompute_ref_logps)
    assert "cache_file = dataset._get_cache_file_path(fingerprint)" in source
    assert "is_main_process" in source
    rows = Dataset.from_dict({"a": [1]})
    assert str(rows._get_cache_file_path("x")).endswith(".arrow")


def test_torchrun_says_which_process_failed_how_and_when() -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.run import get_args_parser, run

    given = get_args_parser().parse_args(["--standalone", "--nproc-per-node", "2", "--module", "some.module", "arg"])
    assert (given.standalone, given.nproc_per_node, given.module) == (True, "2", True)
    assert (given.training_script, given.training_script_args) == ("some.module", ["arg"])
    assert list(inspect.signature(run).parameters) == ["args"]
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=-9, error_file="no file")
    (found,) = ChildFailedError("s", {1: failure}).failures.values()
    assert (found.exitcode, found.timestamp > 0) == (-9, True)
    assert int(SignalException("s", signal.SIGTERM).sigval) == 15


def test_the_model_card_takes_tags_by_name() -> None:
    for trainer in TRAINERS:
        assert {"tags", "model_name"} <= set(inspect.signature(trainer.create_model_card).parameters)


def test_t50_everything_that_the_mixin_overrides_is_there() -> None:
    own = {name for name, one in vars(Hooked).items() if inspect.isfunction(one)} - {"_own_metrics"}
    known = {*SIGNATURES, "training_step", "create_model_card", "_precompute_ref_logps"}
    assert own <= known
    for name in own - {"_precompute_ref_logps"}:
        assert hasattr(Trainer, name)


def test_the_summary_is_logged_with_its_step(ran: Any) -> None:
    trainer, seen, _ = ran
    logs = [given["logs"] for given, _ in seen["log"]]
    assert trainer.state.global_step == 4
    assert any("train_loss" in one for one in logs)
    assert any("loss" in one and "grad_norm" in one and "learning_rate" in one for one in logs)


def test_an_evaluation_gives_its_metrics_where_more_can_be_added(ran: Any) -> None:
    _, seen, _ = ran
    assert len(seen["evaluation_loop"]) == 2
    for given, output in seen["evaluation_loop"]:
        assert given["metric_key_prefix"] == "eval"
        assert output.metrics["eval_loss"] > 0


def test_the_best_metric_decides_on_a_checkpoint(ran: Any) -> None:
    _, seen, _ = ran
    assert [type(found) for _, found in seen["_determine_best_metric"]] == [bool, bool]
    assert seen["_determine_best_metric"][0][1] is True
    assert seen["_load_best_model"], "the best one is loaded at the end"


def test_the_second_of_the_initial_values_is_the_steps_of_an_epoch(ran: Any) -> None:
    _, seen, _ = ran
    ((_, values),) = seen["set_initial_training_values"]
    assert values[1] == 2  # 16 rows in batches of 4, two to a step


def test_optimiser_then_schedule_then_training_begins(ran: Any) -> None:
    trainer, seen, watch = ran
    assert len(seen["create_optimizer"]) == 1
    ((given, schedule),) = seen["create_scheduler"]
    assert given["num_training_steps"] == 4
    assert schedule is not None
    assert trainer._created_lr_scheduler
    assert watch.order == ["begin", "step", "step", "save", "epoch", "step", "step", "save", "epoch"]


def test_an_optimiser_can_be_named_after_the_trainer_is_built(
    rows: Dataset, tiny_model_path: str, tmp_path: Path
) -> None:
    trainer = SFTTrainer(model=tiny_model_path, args=SFTConfig(**common(tmp_path)), train_dataset=rows,
                         eval_dataset=rows)  # fmt: skip
    trainer.optimizer_cls_and_kwargs = (torch.optim.NAdam, {"lr": 0.5})
    assert isinstance(trainer.create_optimizer(), torch.optim.NAdam)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5
    trainer.remove_callback(PrinterCallback)
    assert not any(isinstance(one, PrinterCallback) for one in trainer.callback_handler.callbacks)


def test_the_sums_behind_a_log_line_are_where_totals_reads_them(ran: Any) -> None:
    trainer, seen, watch = ran
    shares = [float(found) for _, found in seen["training_step"]]
    steps = [shares[at] + shares[at + 1] for at in range(0, 8, 2)]
    (first, window, before, logged, tokens, metrics), (second, late, sum_before, late_logged, _, _) = watch.totals
    assert (first, logged, before) == (2, 0, 0.0)
    assert window == pytest.approx(steps[0] + steps[1]), "what training_step returns adds up to the loss of a step"
    assert (second, late_logged) == (4, 3)
    assert (late, sum_before) == (pytest.approx(steps[3]), pytest.approx(sum(steps[:3]), rel=1e-5))
    assert tokens > 0
    assert "train" in metrics
    assert trainer._total_loss_scalar == pytest.approx(sum(steps), rel=1e-5)


def test_a_callback_keeps_its_state_in_a_checkpoint(ran: Any, tmp_path: Path) -> None:
    import json

    found = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())["stateful_callbacks"]
    assert found["Watch"]["args"] == {"kept": 7}


def test_a_loss_is_asked_for_with_the_items_of_all_batches_of_a_step(ran: Any) -> None:
    _, seen, _ = ran
    calls = [given for given, _ in seen["compute_loss"]]
    items = [given.get("num_items_in_batch") for given in calls]
    trained = [int(one) for one in items if one is not None]
    assert len(trained) == 8
    assert trained[0] == trained[1]
    assert items.count(None) == 2 * 2, "an evaluation has no number of items"
    assert all("labels" in given["inputs"] for given in calls)


def test_a_loss_that_is_not_scaled_is_divided_by_the_batches(ran: Any) -> None:
    trainer, _, _ = ran
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.current_gradient_accumulation_steps = 4
    found = []
    for scaled in (True, False):
        trainer.loss_is_scaled_for_ga = scaled
        trainer.model.zero_grad()
        found.append(float(trainer.training_step(trainer.model, dict(batch), torch.tensor(10))))
    assert found[0] == pytest.approx(4 * found[1])


def test_the_logits_come_unless_the_fused_head_is_asked_for(ran: Any) -> None:
    trainer, _, _ = ran
    ids = torch.arange(3, 19)[None]
    assert trainer.model(input_ids=ids).logits.shape[:2] == (1, 16)
    fused = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert fused.log_probs.shape[0] == 1
    assert trainer.aux_loss_enabled is False
    assert (trainer._tp_size, trainer.get_tp_size()) == (1, 1)


def test_the_accelerator_takes_a_scale_through_the_handlers(
    rows: Dataset, tiny_model_path: str, tmp_path: Path
) -> None:
    class Scaled(Hooked, SFTTrainer):  # type: ignore[misc]
        hooks = Hooks(loss_scale=512.0)

    trainer = Scaled(model=tiny_model_path, args=SFTConfig(**common(tmp_path)), train_dataset=rows, eval_dataset=rows)
    assert isinstance(trainer.accelerator.scaler_handler, GradScalerKwargs)
    assert trainer.accelerator.scaler_handler.init_scale == 512.0
    assert list(inspect.signature(torch.amp.GradScaler).parameters)[:2] == ["device", "init_scale"]
    assert "kwargs_handlers" in inspect.signature(Accelerator).parameters


def test_dpo_asks_for_its_reference_where_it_has_no_rows_left() -> None:
    source = inspect.getsource(DPOTrainer.__init__)
    assert "_precompute_ref_logps(" in source
    assert "precompute_ref_log_probs" in inspect.signature(DPOConfig).parameters


def test_a_cache_is_a_list_of_layers_that_can_be_replaced_and_whose_rows_can_be_chosen(tiny_model: Any) -> None:
    """`stagekit.decoding` puts layers of its own into the cache, and selects rows."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=tiny_model.config)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2
    assert list(inspect.signature(DynamicLayer.update).parameters)[:3] == ["self", "key_states", "value_states"]
    assert list(inspect.signature(DynamicLayer.lazy_initialization).parameters) == [
        "self",
        "key_states",
        "value_states",
    ]
    tiny_model(torch.tensor([[5, 6], [7, 8]]), past_key_values=cache, use_cache=True)
    before = cache.layers[0].keys
    cache.batch_select_indices(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.layers[0].keys, before[[1, 1, 0]])
    assert cache.get_seq_length() == 2
    assert tiny_model._supports_logits_to_keep() is True
