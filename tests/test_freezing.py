"""Patterns on real models; what is frozen stays to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
)
from trl import DPOTrainer

from stagekit.errors import ConfigError
from stagekit.freezing import (
    freeze,
    groups_of,
    layout_of,
    lora_extras,
    problems_of_freezing,
    select,
    skeleton,
)
from tests.freezing import blocks_with_adapters, copies, gpt2, llama, lora, moved, trained, trainer_of


# Patterns


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("layers.1", 9),
        ("layers.10", 9),
        ("layers.0-5", 54),
        ("layer.0-5.", 54),
        ("model.layers.10-11", 18),
        ("blocks.3-3", 9),
        ("h.11", 9),
        ("layers", 108),
        ("layer.10-11.*", 18),
        ("layers.0-5.mlp", 18),
        ("layers.2.self_attn.q_proj", 1),
        ("layers.*.mlp", 36),
        ("layers.[0-2].mlp.up_proj", 3),
        ("model.layers.3.mlp", 3),
        ("model.layers.3.mlp.up_proj.weight", 1),
        ("*.q_proj", 12),
        ("*.q_proj.weight", 12),
        ("*layernorm*", 24),
        ("embedding", 1),
        ("embeddings", 1),
        ("embed_tokens", 1),
        ("norm", 1),
        ("model.norm", 1),
        ("lm_head", 1),
        ("*", 111),
        ("model", 110),
    ],
)
def test_t33_a_pattern_means_these_many_weights(pattern: str, count: int) -> None:
    assert len(select(layout_of(llama()), pattern)) == count


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.12", "'layers.12': the model has the blocks 0-11, and 12 goes beyond them"),
        ("layers.8-20", "'layers.8-20': the model has the blocks 0-11, and 8-20 goes beyond them"),
        ("layers.5-0", "'layers.5-0': the model has the blocks 0-11, and 5-0 runs backwards"),
        ("layers.3.mpl", "'layers.3.mpl' matches no weight of this model; did you mean 'layers.3.mlp'"),
        ("embeding", "'embeding' matches no weight of this model; did you mean 'embedding'"),
        ("encoder.", "'encoder.' matches no weight of this model; "),
        ("zzz", "there are model.layers.0-11, embedding, lm_head, norm"),
        ("", "matches no weight"),
        ("q_proj", "'q_proj' matches no weight of this model"),
        ("*.QKV*", "matches no weight"),
    ],
)
def test_t33_a_pattern_that_means_nothing_is_told_with_the_nearest(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        select(layout_of(llama()), pattern)
    assert message in str(error.value)


def test_blocks_are_found_whatever_they_are_called() -> None:
    layout = layout_of(gpt2())
    assert (layout.blocks, layout.count, layout.prefix) == ("transformer.h", 3, "transformer")
    assert select(layout, "layers.0-1") == select(layout, "transformer.h.0") | select(layout, "h.1")
    assert len(select(layout, "layers.2")) == 12
    assert select(layout, "embedding") == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert select(layout, "norm") == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert select(layout, "lm_head") == {"lm_head.weight"}


def test_a_list_of_experts_inside_a_block_is_not_the_list_of_blocks() -> None:
    model = llama(layers=2)
    for block in model.model.layers:
        block.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2))
    layout = layout_of(model)
    assert (layout.blocks, layout.count) == ("model.layers", 2)
    assert len(select(layout, "layers.1.mlp.experts.0")) == 2


def test_a_reward_model_has_a_score_and_no_head(tiny_model_path: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    layout = layout_of(model)
    assert select(layout, "score") == {"score.weight"}
    with pytest.raises(ValueError, match="'lm_head' matches no weight"):
        select(layout, "lm_head")
    assert freeze(model, unfreeze_top_n=1).summary["trained_outside"] == ["model.norm", "score"]


# What is frozen


def test_frozen_patterns_leave_the_rest_to_be_trained() -> None:
    model = llama(tied=False)
    found = freeze(model, frozen=["layers.0-9", "embedding"])
    assert {name.split(".")[2] for name in trained(model) if "layers" in name} == {"10", "11"}
    assert trained(model) >= {"lm_head.weight", "model.norm.weight"}
    per_block = sum(one.numel() for one in model.model.layers[0].parameters())
    assert found.summary == {
        "parameters": 2 * 960 * 16 + 16 + 12 * per_block,
        "trained": 960 * 16 + 16 + 2 * per_block,
        "trained_blocks": [10, 11],
        "blocks": 12,
        "trained_outside": ["lm_head", "model.norm"],
    }


def test_a_frozen_base_trains_what_is_named_also_where_it_is_frozen_by_name() -> None:
    model = llama()
    freeze(model, freeze_base_model=True, frozen=["layers.11"], trainable=["layers.11.mlp", "norm"])
    assert trained(model) == {
        "model.norm.weight",
        *(f"model.layers.11.mlp.{one}_proj.weight" for one in ("gate", "up", "down")),
    }


def test_the_last_blocks_are_trained_with_norm_and_head() -> None:
    model = llama(tied=False)
    assert freeze(model, unfreeze_top_n=2).summary["trained_blocks"] == [10, 11]
    assert {name for name in trained(model) if "layers" not in name} == {"model.norm.weight", "lm_head.weight"}


def test_a_tied_head_stays_frozen_with_the_embedding() -> None:
    model = llama(tied=True)
    assert freeze(model, unfreeze_top_n=2, freeze_base_model=True).summary["trained_outside"] == ["model.norm"]
    assert not model.lm_head.weight.requires_grad


def test_what_came_in_frozen_stays_frozen() -> None:
    model = llama()
    model.model.layers[3].requires_grad_(False)
    freeze(model, frozen=["layers.0"])
    assert not any(one.requires_grad for index in (0, 3) for one in model.model.layers[index].parameters())
    assert all(one.requires_grad for one in model.model.layers[4].parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"frozen": ["embedding"]},
            "stages.s.frozen_layers: 'embedding' means model.embed_tokens.weight, which is one weight with "
            "lm_head.weight (tied); name both or none of them",
        ),
        ({"frozen": ["lm_head"]}, "'lm_head' means lm_head.weight, which is one weight with model.embed_tokens"),
        (
            {"freeze_base_model": True, "trainable": ["lm_head"]},
            "stages.s.trainable_layers: 'lm_head' means lm_head.weight, which is one weight with model.embed_tokens",
        ),
        (
            {"frozen": ["layers.0-5"], "trainable": ["layers.5.mlp"]},
            "stages.s.trainable_layers: 'layers.5.mlp' trains what 'layers.0-5' of frozen_layers freezes (model.lay",
        ),
        ({"frozen": ["*"]}, "stages.s.frozen_layers: leaves no weight to train"),
        ({"freeze_base_model": True}, "stages.s.freeze_base_model: leaves no weight to train"),
        ({"unfreeze_top_n": 13}, "stages.s.unfreeze_top_n_layers: 13 is more than the 12 blocks"),
        ({"frozen": ["layers.0", "nrom"]}, "stages.s.frozen_layers: 'nrom' matches no weight of this model"),
    ],
)
def test_what_cannot_be_frozen_is_told(options: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises(ConfigError) as error:
        freeze(model, where="stages.s", **options)
    assert message in str(error.value)
    assert all(one.requires_grad for one in model.parameters()), "nothing is frozen where something is wrong"


def test_t33_both_names_of_a_tied_weight_freeze_it() -> None:
    model = llama()
    freeze(model, frozen=["embedding", "lm_head"])
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & trained(model)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"unfreeze_top_n": 2, "frozen": ["norm"]}, "unfreeze_top_n_layers"),
        ({"unfreeze_top_n": 2, "trainable": ["norm"]}, "unfreeze_top_n_layers"),
        ({"trainable": ["norm"]}, "trainable_layers"),
        ({"freeze_base_model": True}, "freeze_base_model"),
        ({"freeze_base_model": True, "frozen": ["norm"]}, "freeze_base_model"),
        ({"freeze_base_model": True, "trainable": ["norm"]}, None),
        ({"freeze_base_model": True, "unfreeze_top_n": 1}, None),
        ({"freeze_base_model": True, "lora": True}, None),
        ({"trainable": ["norm"], "lora": True}, None),
        ({"frozen": ["norm"]}, None),
        ({}, None),
    ],
)
def test_a_declaration_that_contradicts_itself_is_told(options: dict[str, Any], path: str | None) -> None:
    plain: dict[str, Any] = {
        "freeze_base_model": False, "frozen": (), "trainable": (), "unfreeze_top_n": 0, "lora": False,
    }  # fmt: skip
    assert [one.path for one in problems_of_freezing(**{**plain, **options})] == ([path] if path else [])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_weights_keep_their_bits_and_the_others_move(
    family: str, checkpointing: bool, sft_rows: list[dict[str, Any]], tmp_path: Path, tiny_model_path: str
) -> None:
    model = llama() if family == "llama" else gpt2()
    patterns = ["layers.0-1", "embedding", "lm_head"]
    trainer = trainer_of(
        model, sft_rows, tmp_path, tiny_model_path, max_steps=3, activation_checkpointing=checkpointing, max_length=128
    )
    freeze(trainer.model, frozen=patterns)
    before, names = copies(model), trained(model)
    trainer.train()
    assert moved(model, before) == names
    assert not any(name.startswith(("model.layers.0.", "transformer.h.1.", "lm_head")) for name in names)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_learn_above_a_frozen_embedding(
    reentrant: bool, sft_rows: list[dict[str, Any]], tmp_path: Path, tiny_model_path: str
) -> None:
    """The same weights as without checkpointing, where the input of the first block needs no gradient."""
    found = []
    for checkpointing in (False, True):
        model = llama(layers=2)
        trainer = trainer_of(
            model,
            sft_rows,
            tmp_path,
            tiny_model_path,
            max_steps=2,
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
        )
        freeze(trainer.model, frozen=["embedding", "lm_head"])
        before = copies(model)
        trainer.train()
        assert moved(model, before) == set(before) - {"model.embed_tokens.weight"}
        found.append(copies(model))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_t32_adapters_in_frozen_blocks_are_frozen() -> None:
    model = lora(llama())
    found = freeze(model, frozen=["layers.0-5", "*.v_proj", "embedding"])
    assert blocks_with_adapters(model) == {6, 7, 8, 9, 10, 11}
    assert all("q_proj.lora_" in name for name in trained(model))
    assert found.summary["trained"] == 6 * 2 * (2 * 16)
    assert found.summary["trained_blocks"] == [6, 7, 8, 9, 10, 11]


def test_a_frozen_base_below_adapters_is_nothing_new() -> None:
    model = lora(llama())
    before = trained(model)
    freeze(model, freeze_base_model=True)
    assert trained(model) == before
    with pytest.raises(ConfigError, match="frozen_layers: leaves no weight to train"):
        freeze(model, frozen=["layers"])


def test_adapters_of_the_last_blocks_only_also_where_the_adapter_came_in() -> None:
    model = lora(llama())
    freeze(model, unfreeze_top_n=3)
    assert blocks_with_adapters(model) == {9, 10, 11}


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], "all-linear"])
def test_a_new_adapter_stands_in_the_last_blocks_only(target: Any) -> None:
    extras = lora_extras(llama(), target, unfreeze_top_n=2)
    model = lora(llama(), target_modules=target, **extras)
    assert blocks_with_adapters(model, only_trained=False) == {10, 11}
    everywhere = lora_extras(llama(), target, unfreeze_top_n=12)
    model = lora(llama(), target_modules=target, **everywhere)
    assert blocks_with_adapters(model) == set(range(12))


def test_a_new_adapter_stands_in_the_last_blocks_of_gpt2() -> None:
    extras = lora_extras(gpt2(), ["c_attn"], unfreeze_top_n=1)
    assert extras == {"layers_to_transform": [2], "layers_pattern": "h"}
    model = lora(gpt2(), target_modules=["c_attn"], **extras)
    assert {name.split(".h.")[1][0] for name in trained(model)} == {"2"}


def test_trainable_modules_are_trained_whole_beside_the_adapters() -> None:
    extras = lora_extras(llama(), ["q_proj"], trainable=["norm", "layers.11.self_attn"])
    names = [f"model.layers.11.self_attn.{one}_proj" for one in "koqv"]
    assert extras == {"modules_to_save": [*names, "model.norm"], "ensure_weight_tying": False}
    model = lora(llama(), target_modules=["q_proj"], **extras)
    whole = {name for name in trained(model) if "lora_" not in name}
    assert whole == {f"base_model.model.{name}.modules_to_save.default.weight" for name in extras["modules_to_save"]}
    assert blocks_with_adapters(model) == set(range(11))
    freeze(model, frozen=["layers.0-9"])
    assert blocks_with_adapters(model) == {10}
    assert whole <= trained(model)


def test_tied_modules_are_trained_whole_as_one() -> None:
    extras = lora_extras(llama(), ["q_proj"], trainable=["embedding", "lm_head"])
    assert extras == {"modules_to_save": ["lm_head", "model.embed_tokens"], "ensure_weight_tying": True}
    model = lora(llama(), target_modules=["q_proj"], **extras)
    base = model.base_model.model
    copy = base.lm_head.modules_to_save["default"].weight
    assert copy is base.model.embed_tokens.modules_to_save["default"].weight
    assert len(groups_of(model)[-1]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": ["lm_head"]}, "trainable_layers: 'lm_head' means lm_head.weight, which is one weight with"),
        ({"trainable": ["nrom"]}, "trainable_layers: 'nrom' matches no weight"),
        ({"unfreeze_top_n": 4}, "unfreeze_top_n_layers: 4 is more than the 3 blocks"),
        ({"trainable": ["*.ln_1.bias"]}, "transformer.h.0.ln_1 has transformer.h.0.ln_1.weight too; name the module"),
    ],
)
def test_what_an_adapter_cannot_have_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        lora_extras(gpt2(), ["c_attn"], **options)
    assert message in str(error.value)


def test_a_skeleton_has_the_names_and_ties_of_the_model(tiny_model_path: str) -> None:
    one, other = layout_of(skeleton(tiny_model_path)), layout_of(AutoModelForCausalLM.from_pretrained(tiny_model_path))
    assert one.weights.keys() == other.weights.keys()
    assert (one.blocks, one.count, one.parts) == (other.blocks, other.count, other.parts)
    assert sorted(map(sorted, one.names_of().values())) == sorted(map(sorted, other.names_of().values()))


def test_frozen_adapters_stay_to_the_bit_where_a_reference_switches_them_off(
    preference_rows: list[dict[str, Any]], tmp_path: Path, tiny_model_path: str
) -> None:
    """peft unfreezes every adapter when one is switched on again, as DPO does at each step for its reference."""
    trainer = trainer_of(
        llama(layers=4),
        preference_rows,
        tmp_path,
        tiny_model_path,
        DPOTrainer,
        max_steps=4,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    found = freeze(trainer.model, frozen=["layers.0-1"])
    names, before = trained(trainer.model), copies(trainer.model)
    with trainer.model.disable_adapter():
        pass
    assert trained(trainer.model) != names, "peft has mended this: hold() and the hooks can go"
    found.hold()
    assert trained(trainer.model) == names
    counted: list[bool] = []

    class Clipped(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            """The gradients that were clipped together."""
            counted.extend(one.grad is not None for one in found.frozen)

    trainer.add_callback(Clipped)
    trainer.train()
    assert moved(trainer.model, before) == names
    assert counted == [False] * 4 * len(found.frozen)
