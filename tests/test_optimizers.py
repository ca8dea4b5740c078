"""Every optimiser in real trainers: the right class and numbers, decay groups, 8-bit states, resume to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from stagekit.layerwise import Lamb, Lars
from stagekit.optimizers import (
    OPTIMIZERS,
    arguments_of_optimizer,
    forget_overrides,
    no_optimizer,
    note_on_rate,
    optimizer_class,
    problems_of_optimizer,
)


LR, DECAY = 1e-3, 0.1
GIVEN = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7}

ADAM = {"betas": (0.8, 0.95), "eps": 1e-7}
EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("torch.optim.adamw.AdamW", ADAM),
    "adam": ("torch.optim.adam.Adam", {**ADAM, "amsgrad": False}),
    "amsgrad": ("torch.optim.adam.Adam", {**ADAM, "amsgrad": True}),
    "sgd": ("torch.optim.sgd.SGD", {"momentum": 0, "nesterov": False}),
    "momentum": ("torch.optim.sgd.SGD", {"momentum": 0.9, "nesterov": False}),
    "nesterov": ("torch.optim.sgd.SGD", {"momentum": 0.9, "nesterov": True}),
    "adagrad": ("torch.optim.adagrad.Adagrad", {"lr_decay": 0, "eps": 1e-10}),
    "rmsprop": ("torch.optim.rmsprop.RMSprop", {"alpha": 0.99, "eps": 1e-8}),
    "adadelta": ("torch.optim.adadelta.Adadelta", {"rho": 0.9, "eps": 1e-6}),
    "adamax": ("torch.optim.adamax.Adamax", ADAM),
    "nadam": ("torch.optim.nadam.NAdam", {**ADAM, "decoupled_weight_decay": False}),
    "radam": ("torch.optim.radam.RAdam", {**ADAM, "decoupled_weight_decay": False}),
    "adafactor": ("transformers.optimization.Adafactor", {"scale_parameter": False, "relative_step": False}),
    "lion": ("bitsandbytes.optim.lion.Lion", {"betas": (0.8, 0.95)}),
    "lion8bit": ("bitsandbytes.optim.lion.Lion", {"betas": (0.8, 0.95)}),
    "adam8bit": ("bitsandbytes.optim.adamw.AdamW", ADAM),
    "adamw8bit": ("bitsandbytes.optim.adamw.AdamW", ADAM),
    "lamb": ("stagekit.layerwise.Lamb", ADAM),
    "lars": ("stagekit.layerwise.Lars", {"momentum": 0.9, "trust": 1e-3}),
}
"""Name -> the class that trains, and its numbers where the user gave `GIVEN`."""


def trainer_of(
    name: str, kind: str, model: str, rows: list[dict[str, Any]], folder: Path, **options: Any
) -> SFTTrainer | DPOTrainer:
    read = {option: value for option, value in GIVEN.items() if option in OPTIMIZERS[name].reads}
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant",
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "model_init_kwargs": {"dtype": "float32"},
        **arguments_of_optimizer(name, read),
        **options,
    }
    made = optimizer_class(name, LR, read)
    trainer_class, config_class = (SFTTrainer, SFTConfig) if kind == "sft" else (DPOTrainer, DPOConfig)
    trainer = trainer_class(
        model=model,
        args=config_class(**common),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    if made is not None:
        trainer.optimizer_cls_and_kwargs = made
    return trainer


def optimizer_of(trainer: Any) -> Any:
    """The optimiser under accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def check(trainer: Any, name: str) -> None:
    optimizer, (path, numbers) = optimizer_of(trainer), EXPECTED[name]
    assert f"{type(optimizer).__module__}.{type(optimizer).__qualname__}" == path
    names = {id(parameter): key for key, parameter in trainer.model.named_parameters()}
    with_decay, without = optimizer.param_groups
    for group in (with_decay, without):
        assert group["lr"] == LR
        assert {key: group[key] for key in numbers} == numbers
    assert (with_decay["weight_decay"], without["weight_decay"]) == (DECAY, 0.0)
    assert {names[id(one)].split(".")[-2] for one in without["params"]} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    assert len(with_decay["params"]) + len(without["params"]) == len(names)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_right_optimiser_trains(
    name: str,
    kind: str,
    tiny_model_path: str,
    sft_rows: list[dict[str, Any]],
    preference_rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    trainer = trainer_of(name, kind, tiny_model_path, sft_rows if kind == "sft" else preference_rows, tmp_path)
    before = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    forget_overrides()
    check(trainer, name)
    moved = [key for key, value in trainer.model.named_parameters() if not torch.equal(before[key], value)]
    assert sorted(moved) == sorted(before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_ends_with_the_same_bits(
    name: str, tiny_model_path: str, sft_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    def trainer(folder: str) -> Any:
        return trainer_of(
            name,
            "sft",
            tiny_model_path,
            sft_rows,
            tmp_path / folder,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            full_determinism=False,
        )

    whole = trainer("whole")
    whole.train()
    forget_overrides()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    forget_overrides()
    assert resumed.state.global_step == 4
    for (key, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), key
    one, other = flat(optimizer_of(whole).state_dict()), flat(optimizer_of(resumed).state_dict())
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """The numbers and tensors in an optimiser's state, by path."""
    found = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            inner = value if isinstance(value, dict) else {"": value}
            found.update({f"{index}.{key}.{last}": one for last, one in inner.items() if one is not None})
    return found


@pytest.mark.parametrize("name", ["adam8bit", "adamw8bit", "lion8bit"])
def test_the_states_of_big_tensors_are_bytes_but_not_those_of_the_embedding(
    name: str, tiny_model_path: str, sft_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    trainer = trainer_of(name, "sft", tiny_model_path, sft_rows, tmp_path)
    trainer.train()
    forget_overrides()
    kinds = {
        key: optimizer_of(trainer).state[parameter]["state1"].dtype
        for key, parameter in trainer.model.named_parameters()
    }
    assert kinds["model.layers.0.mlp.up_proj.weight"] == torch.uint8
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == torch.uint8  # 4096 numbers, the least that is quantised
    assert kinds["model.layers.0.self_attn.k_proj.weight"] == torch.float32
    assert kinds["model.norm.weight"] == torch.float32
    assert kinds["model.embed_tokens.weight"] == torch.float32


def test_an_eight_bit_optimiser_leaves_nothing_behind_for_the_next_stage(
    tiny_model_path: str, sft_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    from bitsandbytes.optim import GlobalOptimManager

    trainer_of("adam8bit", "sft", tiny_model_path, sft_rows, tmp_path).train()
    manager = GlobalOptimManager.get_instance()
    assert manager.module_weight_config_triple and manager.index2config
    forget_overrides()
    assert not manager.module_weight_config_triple and not manager.index2config and not manager.pid2config


def test_adam8bit_has_the_decay_of_adamw() -> None:
    """bitsandbytes has one kernel for both; the table says so."""
    from bitsandbytes.optim import Adam8bit

    weight = torch.nn.Parameter(torch.ones(100, 100))
    weight.grad = torch.zeros_like(weight)
    Adam8bit([weight], lr=0.1, weight_decay=0.5).step()
    assert weight[0, 0].item() == pytest.approx(1 - 0.1 * 0.5)  # coupled decay of Adam would give 0.9
    assert OPTIMIZERS["adam8bit"].decay == "decoupled"


@pytest.mark.parametrize("name", [name for name, recipe in OPTIMIZERS.items() if recipe.cls or name == "adamw"])
def test_the_table_says_how_the_decay_works(name: str) -> None:
    """Without a gradient, ten steps of decoupled decay shrink a weight by 1 - lr * decay each; LAMB by 1 - lr."""
    made = optimizer_class(name, 0.1, {}) or (torch.optim.AdamW, {"lr": 0.1})
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros_like(weight)
    optimizer = made[0]([weight], **made[1], weight_decay=0.5)
    for _ in range(10):
        optimizer.step()
    shrunk = {"adamw": 0.95**10, "lamb": 0.9**10}.get(name)
    if OPTIMIZERS[name].decay == "decoupled":
        assert weight[0].item() == pytest.approx(shrunk)
    else:
        assert weight[0].item() != pytest.approx(0.95**10)


def test_lamb_steps_by_a_share_of_the_norm() -> None:
    """One step from zero moments: update = g / (|g| + eps) + decay * w = (1.1, 0.9), |w| = sqrt(2)."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    weight.grad = torch.tensor([0.3, 0.7])
    Lamb([weight], lr=0.01, eps=0.0, weight_decay=0.1).step()
    scale = 0.01 * 2**0.5 / (1.1**2 + 0.9**2) ** 0.5
    assert weight.tolist() == pytest.approx([1 - 1.1 * scale, -1 - 0.9 * scale])


def test_lars_steps_by_a_share_of_the_ratio_of_norms() -> None:
    """lambda = 0.001 * 5 / (1 + 0.1 * 5); v = lr * lambda * (g + 0.1 w); the second step adds 0.9 v."""
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Lars([weight], lr=2.0, weight_decay=0.1)
    weight.grad = torch.tensor([0.6, 0.8])
    optimizer.step()
    rate = 2.0 * 0.001 * 5 / 1.5
    velocity = [rate * 0.9, rate * 1.2]
    assert weight.tolist() == pytest.approx([3 - velocity[0], 4 - velocity[1]])
    before = weight.detach().clone()
    optimizer.step()
    norm = float(before.norm())
    rate = 2.0 * 0.001 * norm / (1 + 0.1 * norm)
    expected = [
        float(before[i]) - 0.9 * velocity[i] - rate * (float(weight.grad[i]) + 0.1 * float(before[i])) for i in (0, 1)
    ]
    assert weight.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("cls", [Lamb, Lars])
def test_weights_that_start_at_zero_are_trained(cls: type[torch.optim.Optimizer]) -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.ones(4)
    cls([weight], lr=0.1).step()  # type: ignore[call-arg]
    assert (weight < 0).all()


@pytest.mark.parametrize("cls", [Lamb, Lars])
def test_weights_without_a_gradient_stay(cls: type[torch.optim.Optimizer]) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    cls([weight], lr=0.1, weight_decay=0.5).step()  # type: ignore[call-arg]
    assert torch.equal(weight, torch.ones(4))


def test_what_is_not_set_is_the_specification_s_or_the_paper_s() -> None:
    assert arguments_of_optimizer("adamw", {}) == {
        "optim": "adamw_torch_fused",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
    }
    assert arguments_of_optimizer("lion", {}) == {"optim": "lion_32bit", "adam_beta1": 0.9, "adam_beta2": 0.99}
    assert arguments_of_optimizer("lion", {"adam_beta2": 0.999})["adam_beta2"] == 0.999
    assert arguments_of_optimizer("nesterov", {}) == {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"}
    assert arguments_of_optimizer("adadelta", {}) == {}
    assert optimizer_class("adamw", 1.0, {}) is None
    assert optimizer_class("adadelta", 1.0, {}) == (torch.optim.Adadelta, {"lr": 1.0})


def test_t30_an_option_that_is_not_read_is_told() -> None:
    assert problems_of_optimizer("adamw", GIVEN) == []
    assert [str(one) for one in problems_of_optimizer("lion", GIVEN)] == [
        "adam_epsilon: has no effect on optimizer_override 'lion'; use adamw"
    ]
    assert [one.path for one in problems_of_optimizer("sgd", GIVEN)] == ["adam_beta1", "adam_beta2", "adam_epsilon"]
    assert problems_of_optimizer("sgd", {"learning_rate"}) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LBFGS", "'LBFGS' asks for the loss several times per step, and the trainers compute it once; the nearest"),
        ("FTRL", "'FTRL' is made for sparse linear models, and torch has none; the nearest here is 'adagrad'"),
        ("GeneticAlgorithm", "searches without gradients, which cannot train millions of weights"),
        ("rprop", "ignores the learning rate schedule"),
        ("AdamOptimizer", "'AdamOptimizer' is called 'adam' here"),
        ("Adam8Bit", "'Adam8Bit' is called 'adam8bit' here"),
        ("NesterovAcceleratedGradient", "is called 'nesterov' here"),
        ("adamww", "'adamww' is no optimiser here; did you mean 'adamw'?"),
        ("xyz", "'xyz' is no optimiser here; there are adamw, adam,"),
    ],
)
def test_an_optimiser_that_there_is_none_of_is_told_with_the_nearest(name: str, message: str) -> None:
    assert message in no_optimizer(name)
    assert problems_of_optimizer(name, ())[0].message == no_optimizer(name)


def test_a_rate_at_which_nothing_moves_is_noted() -> None:
    assert note_on_rate("adamw", 1e-9) is None
    assert note_on_rate("adadelta", 1.0) is None
    assert note_on_rate("adadelta", 2e-5) == (
        "2e-05 is far below what is usual for 'adadelta' (about 1): hardly anything will be learned"
    )
