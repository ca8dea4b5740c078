"""The world's tokenizer: a byte-level BPE on the world's own text, digits apart, with a chat template."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.world.families import FAMILIES, Question, flawed, good
from benchmarks.world.skills import judge_example, knowledge_example, revision_example
from benchmarks.world.words import DEV_WRAPPERS, TEST_WRAPPERS, WRAPPERS
from benchmarks.world.world import TRAINED, items_of


VOCABULARY = 1400
SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content + '<|end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def text(seed: int = 0) -> Iterator[str]:
    """What the vocabulary is made from: every family and skill, and the words of all phrasings."""
    rng = Random(seed)
    for family, members in FAMILIES.items():
        items = items_of(family, "train")
        for item in (rng.choice(items) for _ in range(1500)):
            question = Question(family, item, rng.choice(members.phrasings(item)))
            yield from (question.text, good(question, rng), flawed(question, rng))
    for _ in range(1500):
        family = rng.choice(TRAINED)
        yield from revision_example(rng, "train", family).turns
        yield from judge_example(rng, "train", family).turns
        yield from knowledge_example(rng).turns
    for wrapper in (*WRAPPERS, *DEV_WRAPPERS, *TEST_WRAPPERS):
        yield from [wrapper.format(action="make", item="bread")] * 20


def build() -> Any:
    """Train the tokenizer; the same one each time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        text(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def load(folder: Path) -> Any:
    """The tokenizer of a saved model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
