"""The distillation trainer on tiny models: SFT at alpha 0, what counts, hidden states, memory, saving, bad input."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from stagekit.distillation_losses import divergence, soften
from stagekit.errors import ConfigError, StageError
from stagekit.models import bnb_config
from stagekit.trainers import distillation_head
from stagekit.trainers.distillation import PROJECTIONS, DistillationTrainer
from stagekit.trainers.distillation_head import base_of
from stagekit.trainers.distillation_student import kept_blocks, student_of
from tests.trainers.distilling import SETTINGS, batch, builder, config, logged, loss_of, losses, model, tokenizer


@pytest.fixture
def rows(sft_rows: list[Any]) -> Dataset:
    return Dataset.from_list(sft_rows)


@pytest.fixture
def build(tiny_model_path: str, rows: Dataset, tmp_path: Path) -> Callable[..., DistillationTrainer]:
    return builder(tiny_model_path, rows, tmp_path)


class Shifted(torch.nn.Module):
    """A teacher's block of nothing that adds to the last hidden state at one position."""

    def __init__(self, norm: Any, rows: Any, at: Any) -> None:
        super().__init__()
        self.norm, self.rows, self.at = norm, rows, at

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = self.norm(hidden).clone()
        found[self.rows, self.at, 0] += 5.0
        return found


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    "peft", [None, LoraConfig(r=4, lora_dropout=0.3, task_type="CAUSAL_LM")], ids=["full", "lora"]
)
def test_alpha_zero_is_trl_s_sft_bit_for_bit(
    hidden: bool, peft: Any, build: Any, tiny_model_path: str, rows: Dataset, tmp_path: Path
) -> None:
    ours = build("no/teacher-is-loaded", alpha=0.0, match_hidden_states=hidden, peft=peft, max_steps=4)
    ours.train()
    theirs = SFTTrainer(
        tiny_model_path,
        SFTConfig(str(tmp_path / "sft"), **{**SETTINGS, "max_steps": 4}),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer(tiny_model_path),
        peft_config=peft,
    )
    theirs.train()
    assert losses(ours) == losses(theirs)
    assert logged(ours, "grad_norm") == logged(theirs, "grad_norm")
    for (name, one), (_, other) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert ours.evaluate()["eval_loss"] == theirs.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "packing_strategy": "bfd", "max_length": 64},
        {"padding_free": True, "max_length": None},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    ],
    ids=["packing", "padding-free", "accumulation"],
)
def test_alpha_zero_is_trl_s_sft_however_the_rows_are_laid_out(
    changes: dict[str, Any], build: Any, tiny_model_path: str, rows: Dataset, tmp_path: Path
) -> None:
    ours = build("no/teacher-is-loaded", alpha=0.0, max_steps=2, **changes)
    theirs = SFTTrainer(
        tiny_model_path,
        SFTConfig(str(tmp_path / "sft"), **{**SETTINGS, "max_steps": 2, **changes}),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer(tiny_model_path),
    )
    for one in (ours, theirs):
        one.train()
    assert losses(ours) == losses(theirs)
    for (name, one), (_, other) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_hard_part_is_trl_s_sft_loss_and_its_numbers_are_logged(
    build: Any, tiny_model_path: str, rows: Dataset, tmp_path: Path
) -> None:
    ours = build(model(tiny_model_path, 1), max_steps=1)
    sft = SFTTrainer(
        tiny_model_path,
        SFTConfig(str(tmp_path / "sft"), **{**SETTINGS, "max_steps": 1}),
        train_dataset=rows,
        processing_class=tokenizer(tiny_model_path),
    )
    for one in (ours, sft):
        one.train()
    assert logged(ours, "hard_loss") == pytest.approx(losses(sft), rel=1e-6)
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(ours, name) == pytest.approx(logged(sft, name), rel=1e-5)
    soft, hard = logged(ours, "soft_loss")[0], logged(ours, "hard_loss")[0]
    assert losses(ours) == pytest.approx([0.5 * soft + 0.5 * hard], rel=1e-6)
    assert soft > 0.1


def test_with_alpha_one_the_labels_decide_only_where_is_counted(build: Any, tiny_model_path: str) -> None:
    trainer = build(model(tiny_model_path, 1), alpha=1.0)
    given = batch(trainer)
    other = {**given, "labels": torch.where(given["labels"] == -100, -100, 7)}
    found = []
    for one in (given, other):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(one))
        loss.backward()
        found.append((loss.detach(), [parameter.grad.clone() for parameter in trainer.model.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(one, two) for one, two in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_teacher_that_is_the_student_leaves_the_labels_alone(kind: str, build: Any, tiny_model_path: str) -> None:
    trainer = build(model(tiny_model_path), divergence=kind, match_hidden_states=True, alpha=0.3)
    loss = trainer.compute_loss(trainer.model, batch(trainer))
    parts = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    assert (parts["soft_loss"], parts["hidden_loss"]) == (0.0, 0.0)  # exactly
    assert float(loss.detach()) == pytest.approx(0.7 * parts["hard_loss"], rel=1e-6)


def test_t47_the_loss_is_the_formula_on_whole_logits(build: Any, tiny_model_path: str) -> None:
    """The chunks, the mask and the division against the definition, written out on full matrices."""
    teacher = model(tiny_model_path, 1)
    trainer = build(teacher, alpha=0.6, temperature=3.0, chunk_tokens=5, divergence="jsd", mixture=0.3)
    given = batch(trainer)
    labels = given["labels"][:, 1:]
    mask = labels != -100
    ids = {name: given[name] for name in ("input_ids", "attention_mask")}
    ours, theirs = (one(**ids).logits[:, :-1][mask] for one in (trainer.model, teacher))
    soft = 9 * divergence(soften(ours, 3.0), soften(theirs, 3.0), "jsd", 0.3).sum()
    hard = torch.nn.functional.cross_entropy(ours, labels[mask], reduction="sum")
    wanted = (0.6 * soft + 0.4 * hard) / 50
    gradients = torch.autograd.grad(wanted, list(trainer.model.parameters()))
    loss = trainer.compute_loss(trainer.model, given, num_items_in_batch=torch.tensor(50))
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    loss.backward()
    for parameter, gradient in zip(trainer.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["first", "last", "prompt", "end", "pad"])
def test_the_token_that_predicts_the_first_label_counts_and_those_outside_do_not(
    where: str, build: Any, tiny_model_path: str
) -> None:
    """The mask is that of the labels, shifted: DistillKit leaves the first out and counts the one after the end."""
    teacher = model(tiny_model_path)
    trainer = build(teacher, alpha=1.0)
    given = batch(trainer)
    labels, lengths = given["labels"], given["attention_mask"].sum(1)
    first = (labels != -100).int().argmax(1)  # where the first label stands; it is predicted one before
    last = labels.size(1) - 1 - (labels != -100).int().flip(1).argmax(1)
    padded = torch.tensor([row for row in range(4) if lengths[row] < labels.size(1)])
    rows, at = {
        "first": (torch.arange(4), first - 1),
        "last": (torch.arange(4), last - 1),
        "prompt": (torch.arange(4), first - 2),
        "end": (torch.arange(4), last),
        "pad": (padded, lengths[padded]),
    }[where]
    teacher.model.norm = Shifted(teacher.model.norm, rows, at)
    loss = float(trainer.compute_loss(trainer.model, given).detach())
    assert (loss > 1e-3) if where in ("first", "last") else loss == 0.0


def test_padding_on_either_side_and_of_any_amount_makes_no_difference(build: Any, tiny_model_path: str) -> None:
    trainer = build(model(tiny_model_path, 1), match_hidden_states=True)
    given = batch(trainer)
    plain = loss_of(trainer, given, 100)
    values = {"input_ids": 3, "labels": -100, "attention_mask": 0}
    wider = {name: torch.nn.functional.pad(given[name], (0, 9), value=value) for name, value in values.items()}
    assert loss_of(trainer, wider, 100) == pytest.approx(plain, rel=1e-6)
    left = {name: torch.full_like(given[name], value) for name, value in values.items()}
    positions = torch.zeros_like(given["input_ids"])
    for row, length in enumerate(given["attention_mask"].sum(1).tolist()):
        for name, one in left.items():
            one[row, -length:] = given[name][row, :length]
        positions[row, -length:] = torch.arange(length)
    assert loss_of(trainer, {**left, "position_ids": positions}, 100) == pytest.approx(plain, rel=1e-5)


def test_packed_rows_are_told_apart_for_the_teacher_too(build: Any, tiny_model_path: str) -> None:
    teacher = model(tiny_model_path, 1)
    trainer = build(teacher, match_hidden_states=True)
    given = batch(trainer)
    lengths = given["attention_mask"].sum(1).tolist()
    flat = {
        name: torch.cat([row[:length] for row, length in zip(given[name], lengths, strict=True)])[None]
        for name in ("input_ids", "labels")
    }
    flat["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    assert loss_of(trainer, flat, 100) == pytest.approx(loss_of(trainer, given, 100), rel=1e-5)


def test_eight_rows_at_once_are_two_times_four_accumulated(build: Any, tiny_model_path: str) -> None:
    found = []
    for size, accumulate in ((8, 1), (4, 2), (1, 8)):
        trainer = build(
            model(tiny_model_path, 1, hidden_size=32, head_dim=8), match_hidden_states=True, max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, learning_rate=1e-2,
        )  # fmt: skip
        trainer.train()
        found.append((losses(trainer), dict(trainer.projections.named_parameters())))
    for other, projections in found[1:]:
        assert other == pytest.approx(found[0][0], rel=1e-5)
        for name, projection in projections.items():
            torch.testing.assert_close(projection, found[0][1][name], rtol=1e-4, atol=1e-5)


def test_a_wider_teacher_s_projections_are_trained_and_never_saved_with_the_student(
    build: Any, tiny_model_path: str, tmp_path: Path
) -> None:
    teacher = model(tiny_model_path, 1, hidden_size=96, head_dim=24, num_hidden_layers=4)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = build(teacher, match_hidden_states=True, save_strategy="steps", save_steps=2, max_steps=3)
    assert trainer.layer_pairs == [(1, 0), (3, 1)]
    started = {name: tensor.clone() for name, tensor in trainer.projections.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in started.items()} == {
        "1-0.weight": (96, 64),
        "3-1.weight": (96, 64),
    }
    for tensor in started.values():
        torch.testing.assert_close(tensor.T @ tensor, torch.eye(64), rtol=0, atol=1e-5)
    trainer.train()
    for name, tensor in trainer.projections.state_dict().items():
        assert not torch.equal(tensor, started[name])
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
    checkpoint = tmp_path / "out/checkpoint-2"
    assert set(load_file(checkpoint / PROJECTIONS)) == set(started)
    trainer.save_model(str(tmp_path / "student"))
    for folder in (tmp_path / "student", checkpoint):
        _, about = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not about["unexpected_keys"] and not about["missing_keys"] and not about["mismatched_keys"]
        stored = set(load_file(folder / "model.safetensors"))
        assert stored == set(load_file(Path(tiny_model_path) / "model.safetensors"))


def test_a_resumed_training_ends_with_the_same_bits_projections_included(
    build: Any, tiny_model_path: str, tmp_path: Path
) -> None:
    teacher = model(tiny_model_path, 1, hidden_size=32, head_dim=8)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = build(teacher, match_hidden_states=True, **saving)
    whole.train()
    again = build(teacher, match_hidden_states=True, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    for one, other in ((whole.model, again.model), (whole.projections, again.projections)):
        for (name, first), (_, second) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(first, second), name
    (tmp_path / "out/checkpoint-2" / PROJECTIONS).unlink()
    with pytest.raises(StageError, match=r"projections.safetensors is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))


def test_hidden_states_of_the_student_move_to_the_teacher_s(build: Any, tiny_model_path: str) -> None:
    trainer = build(
        model(tiny_model_path, 1, num_hidden_layers=4), alpha=1.0, match_hidden_states=True, max_steps=30,
        hidden_weight=10.0, learning_rate=3e-3,
    )  # fmt: skip
    trainer.train()
    hidden = logged(trainer, "hidden_loss")
    assert hidden[-1] < 0.6 * hidden[0]
    with_soft_alone = build(model(tiny_model_path, 1, num_hidden_layers=4), alpha=1.0, hidden_weight=0.0,
                            match_hidden_states=True, max_steps=30, learning_rate=3e-3)  # fmt: skip
    with_soft_alone.train()
    assert hidden[-1] < 0.8 * logged(with_soft_alone, "hidden_loss")[-1]


def test_vocabularies_padded_to_different_sizes_are_cut_to_the_tokenizer_s(build: Any, tiny_model_path: str) -> None:
    teacher = model(tiny_model_path, 1)
    plain = build(teacher, alpha=1.0)
    found = loss_of(plain, batch(plain), 100)
    teacher.resize_token_embeddings(1024)
    student = model(tiny_model_path)
    student.resize_token_embeddings(992)
    padded = build(teacher, student, alpha=1.0)
    assert padded._vocabulary == 960
    assert loss_of(padded, batch(padded), 100) == pytest.approx(found, rel=1e-6)
    small = model(tiny_model_path, 1)
    small.resize_token_embeddings(900)
    with pytest.raises(ConfigError, match="the teacher's head has 900 rows, its tokenizer 960 tokens"):
        build(small)


def test_the_whole_matrix_of_logits_never_exists(
    build: Any, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(model(tiny_model_path, 1), chunk_tokens=8)
    given = batch(trainer)
    predicting = int((given["labels"][:, 1:] != -100).sum())
    sizes: list[int] = []
    original = distillation_head.Head.product

    def product(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        found = original(self, hidden)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(distillation_head.Head, "product", product)
    loss = trainer.compute_loss(trainer.model, given)
    chunks = math.ceil(predicting / 8)
    assert chunks > 3
    assert len(sizes) == 2 * chunks  # the student's and the teacher's
    assert max(sizes) == 8 and sum(sizes) == 2 * predicting  # labels only, prompts and padding not
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        trainer.compute_loss(trainer.model, batch(trainer))
    assert all(shape[0] <= 8 for shape in kept if shape[-1:] == (960,))  # logits of a chunk, no more
    loss.backward()
    assert len(sizes) == 4 * chunks  # of both losses; the backward pass makes none again


def test_the_gradient_is_scaled_by_what_comes_from_above_and_given_once(build: Any, tiny_model_path: str) -> None:
    trainer = build(model(tiny_model_path, 1), alpha=0.3)
    given = batch(trainer)
    found = []
    for scale in (1.0, -3.0):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(given))
        (scale * loss).backward(retain_graph=scale < 0)
        found.append([parameter.grad.clone() for parameter in trainer.model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(-3.0 * one, other, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # and never wrong in silence
        loss.backward()


def test_a_batch_without_any_label_costs_nothing(build: Any, tiny_model_path: str) -> None:
    trainer = build(model(tiny_model_path, 1), match_hidden_states=True)
    given = batch(trainer)
    given["labels"].fill_(-100)
    loss = trainer.compute_loss(trainer.model, given)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(float(parameter.grad.abs().max()) == 0 for parameter in trainer.model.parameters())


@pytest.mark.parametrize("changes", [{"bf16": True}, {"activation_checkpointing": True}], ids=str)
def test_mixed_precision_and_checkpointing_give_the_same_loss(
    changes: dict[str, Any], build: Any, tiny_model_path: str
) -> None:
    teacher = model(tiny_model_path, 1, hidden_size=32, head_dim=8)
    plain, other = build(teacher, match_hidden_states=True), build(teacher, match_hidden_states=True, **changes)
    for one in (plain, other):
        one.train()
    assert losses(other) == pytest.approx(losses(plain), rel=2e-2 if "bf16" in changes else 1e-5)


def test_a_student_with_an_adapter_learns_and_its_base_stays(build: Any, tiny_model_path: str) -> None:
    teacher = model(tiny_model_path, 1, hidden_size=32, head_dim=8)
    peft = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = build(teacher, peft=peft, match_hidden_states=True, alpha=1.0, max_steps=15, learning_rate=1e-2)
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    base, trained = model(tiny_model_path).state_dict(), base_of(trainer.model).state_dict()
    assert torch.equal(trained["model.layers.0.self_attn.q_proj.base_layer.weight"],
                       base["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
def test_the_teacher_may_be_quantised(bits: Any, build: Any, tiny_model_path: str) -> None:
    kwargs = {"quantization_config": bnb_config(bits, torch.float32), "dtype": torch.float32}
    trainer = build(tiny_model_path, teacher_model_init_kwargs=kwargs, alpha=1.0, match_hidden_states=True)
    kinds = {type(module).__name__ for module in trainer.teacher.modules()}
    assert {8: "Linear8bitLt", 4: "Linear4bit"}[bits] in kinds
    trainer.train()
    # the student is the teacher before it was rounded: close, not the same; another model of its size is at 4
    assert 0 < losses(trainer)[0] < {8: 0.1, 4: 1.0}[bits]


def test_an_architecture_that_makes_its_logits_otherwise_is_refused(build: Any, tiny_model_path: str) -> None:
    teacher = model(tiny_model_path, 1)
    plain = teacher.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    teacher.forward = doubled
    with pytest.raises(ConfigError, match="the teacher is a LlamaForCausalLM, whose logits are not its head's"):
        build(teacher)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 0.05}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
def test_logits_that_are_scaled_or_capped_are_made_as_the_architecture_does(
    family: str, changes: dict[str, Any], tiny_model_path: str
) -> None:
    from transformers import CONFIG_MAPPING

    sizes = {"vocab_size": 960, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 16, "pad_token_id": 3}  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes, **changes)).eval()
    distillation_head.check_head(made, "teacher")
    bare = distillation_head.head_of(made)
    unscaled = distillation_head.Head(bare.weight, bare.bias, 1.0, None)
    hidden = made.base_model(torch.arange(4)[None]).last_hidden_state[0]
    assert not torch.allclose(bare.logits(hidden), unscaled.logits(hidden), rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 0.5)])
def test_the_gradient_made_along_with_the_chunks_is_that_of_the_whole_logits(
    scale: float, softcap: float | None, dtype: torch.dtype
) -> None:
    """Three chunks of 5 tokens, a head with a bias; written out on whole logits beside it, in float64."""
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((13, 8), (32, 8), (32,)))
    labels, theirs = torch.randint(32, (13,)), torch.randn(13, 32).log_softmax(-1)

    def ask(rows: slice) -> Any:
        said = theirs[rows]
        return lambda logits, block: divergence(soften(logits, 2.0), said[block].to(logits.dtype), "jsd", 0.3)

    head = distillation_head.Head(weight, bias, scale, softcap)
    lesson = distillation_head.Lesson(ask, 2.4, 0.4, None, (), 5)
    objective, *tokens = distillation_head._Objective.apply(hidden, weight, bias, labels, head, lesson, True)
    found = torch.autograd.grad(objective, (hidden, weight, bias))
    assert [one.dtype for one in found] == [dtype] * 3 and not any(one.requires_grad for one in tokens)
    wide = [one.detach().double().requires_grad_() for one in (hidden, weight, bias)]
    logits = scale * torch.nn.functional.linear(*wide)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_probs = logits.log_softmax(-1)
    hard = -log_probs.gather(-1, labels[:, None])[:, 0]
    whole = 2.4 * ask(slice(None))(logits, slice(None)).sum() + 0.4 * hard.sum()
    near = 1e-5 if dtype == torch.float32 else 2e-2
    for one, wanted in (
        (objective, whole),
        (tokens[0], -hard),
        (tokens[1], -(log_probs.exp() * log_probs).sum(-1)),
        *zip(found, torch.autograd.grad(whole, wide), strict=True),
    ):
        assert float((one - wanted).abs().max()) <= near * float(wanted.abs().max())
    frozen = distillation_head.Head(weight.detach(), None, scale, softcap)
    alone, *_ = distillation_head._Objective.apply(hidden, frozen.weight, None, labels, frozen, lesson, True)
    assert [one is None for one in alone.grad_fn.saved_tensors] == [False, True, True]  # an adapter's student


def test_another_loss_of_the_user_s_is_refused(tiny_model_path: str, rows: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compute_loss_func: takes the place"):
        DistillationTrainer(
            tiny_model_path, config(tmp_path), teacher_model=model(tiny_model_path, 1), train_dataset=rows,
            processing_class=tokenizer(tiny_model_path), compute_loss_func=lambda *_, **__: 0.0,
        )  # fmt: skip


def test_another_tokenizer_is_refused_with_the_modes_that_work(
    build: Any, tiny_model_path: str, rows: Dataset, tmp_path: Path
) -> None:
    other = tokenizer(tiny_model_path)
    other.add_tokens(["<more>"])
    with pytest.raises(ConfigError, match=r"another tokenizer: 961 tokens beside the student's 960, and '<more>' is"):
        DistillationTrainer(
            tiny_model_path, config(tmp_path), teacher_model=model(tiny_model_path, 1), train_dataset=rows,
            processing_class=tokenizer(tiny_model_path), teacher_processing_class=other,
        )  # fmt: skip
    nameless = model(tiny_model_path, 1)
    nameless.config._name_or_path = nameless.name_or_path = ""
    with pytest.raises(ConfigError, match="teacher_processing_class: missing"):
        build(nameless)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 1.5}, "alpha: 1.5 is no share"),
        ({"temperature": 0.0}, "temperature: 0.0 must be above 0 and at most 100"),
        ({"temperature": 101.0}, "temperature: 101.0"),
        ({"divergence": "kl"}, "divergence: 'kl' is none of"),
        ({"mixture": 0.3}, "mixture: 0.3 must be between 0 and 1, for jsd or skewed_kl"),
        ({"hidden_loss": "l2"}, "hidden_loss: 'l2' is none of"),
        ({"chunk_tokens": 0}, "chunk_tokens: 0"),
        ({"loss_type": "dft"}, "loss_type: 'dft' is no likelihood of the labels"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: has no effect beside a teacher"),
        ({"match_hidden_states": True, "layer_map": {"9": 0}}, "layer_map: 9: 0 names block 9 of the teacher"),
    ],
)
def test_an_argument_that_cannot_be_is_told(
    changes: dict[str, Any], words: str, build: Any, tiny_model_path: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(model(tiny_model_path, 1), **changes)
    assert words in str(caught.value)


def test_the_student_is_not_its_own_teacher_and_there_is_one(build: Any, tiny_model_path: str) -> None:
    student = model(tiny_model_path)
    with pytest.raises(ConfigError, match="teacher_model: missing"):
        build(None)
    with pytest.raises(ConfigError, match="is the student itself"):
        build(student, student)


@pytest.mark.parametrize(
    ("depths", "kept"),
    [((12, 6), [0, 2, 4, 7, 9, 11]), ((12, 3), [0, 6, 11]), ((12, 1), [0]), ((4, 4), [0, 1, 2, 3]), ((6, 2), [0, 5])],
)
def test_a_student_keeps_blocks_spread_over_the_teacher(depths: tuple[int, int], kept: list[int]) -> None:
    """12 -> 6 is DistilBERT's table, 12 -> 3 and 6 -> 2 those of seq2seq-distillation's make_student.py."""
    assert kept_blocks(*depths) == kept


def test_a_student_of_all_blocks_is_the_teacher(tiny_model_path: str) -> None:
    teacher = model(tiny_model_path, 1, num_hidden_layers=3)
    ids = torch.arange(8)[None]
    assert torch.equal(student_of(teacher, 3)(ids).logits, teacher(ids).logits)
    half = student_of(teacher, 2)
    assert half.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 3
    teacher.model.layers = torch.nn.ModuleList([teacher.model.layers[0], teacher.model.layers[2]])
    assert torch.equal(half(ids).logits, teacher(ids).logits)
