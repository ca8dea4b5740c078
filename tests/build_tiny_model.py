"""Builds the tiny random Llama and its tokenizer, `stagekit/recipes/data/tiny`, the same bytes each time.

Run `python -m tests.build_tiny_model`. The weights come from seed 0, the vocabulary from the prompts and principles
that stagekit ships, so a change of those files changes the token ids: run it again and commit the result.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "stagekit/recipes/data/tiny"
PROMPT_FILES = (ROOT / "stagekit/recipes/data/red_team.jsonl", ROOT / "stagekit/recipes/data/harmless.jsonl")
PRINCIPLES_FILE = ROOT / "stagekit/principles.json"

VOCAB_SIZE = 960
MAX_LENGTH = 2048
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
EOS_TOKEN, PAD_TOKEN = "<|im_end|>", "<|pad|>"

# ChatML. The newline after <|im_end|> stands outside the generation block: the model stops before it is written.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + (call.function if call.function is defined else call) | tojson + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

INLINE_TEXT = (
    "You are a helpful, honest and harmless assistant. Answer the question in a few short sentences.",
    "I'm sorry, but I can't help with that. Here is what I can do instead: explain the risk and suggest a safe way.",
    "Sure, here is one way to do it. First, think about what you need. Then work through the steps one by one.",
    "The response is good because it is clear, correct and kind. The response is bad because it is rude or wrong.",
    "Yes. No. A. B. (A) (B) Response A is better. Response B is better. Score: 1 2 3 4 5 6 7 8 9 10.",
    "What is 12 + 7? 12 + 7 = 19. The answer is 19. There are 60 minutes in an hour and 24 hours in a day.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i)\n",
    "The quick brown fox jumps over the lazy dog while seven wizards bake bread, mix jam and quietly fix the oven.",
    "Could you please tell me how long rice should cook, how much water it needs, and whether to wash it before?",
    "I would not do that, because somebody could get hurt. If you are worried about a friend, talk with them today.",
    "People often ask about money, health, school, work, travel, family, animals, weather, music and computers.",
    "It depends on where you live and when you start. Most people find that practice, patience and sleep help.",
    "The train leaves the station at nine, passes three small towns and reaches the city just before lunch.",
    "Write a short story about a child who finds an old map in the garden and follows the river to the sea.",
    "Water boils at 100 degrees, light travels faster than sound, and plants turn sunlight into sugar.",
    "Please never share your password with anyone; change it now, and turn on the second factor.",
    "Critique request: name what is wrong with the last response. Revision request: rewrite the last response.",
)


def training_text() -> list[str]:
    """The lines that the vocabulary is trained on, in a fixed order."""
    principles = json.loads(PRINCIPLES_FILE.read_text(encoding="utf-8"))
    pairs = [p[key] for p in principles["principles"] for key in ("critique_request", "revision_request")]
    rows = [json.loads(line) for path in PROMPT_FILES for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [message["content"] for row in rows for message in row["prompt"]]
    return [*INLINE_TEXT, *pairs, *principles["comparison_principles"], *prompts]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which any text survives encoding and decoding, with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    # A newline is always a token of its own: otherwise "assistant\n" and a completion that starts with a newline
    # would merge, and the tokens of the prompt would be no prefix of those of prompt and completion.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n"), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens; VOCAB_SIZE is {VOCAB_SIZE}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama that samples varied printable text and stops after 20 tokens or so."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.25 if "embed" in name else 0.15, generator=generator)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.model.embed_tokens.weight[tokenizer.eos_token_id] = 0.0
        model.model.embed_tokens.weight[:, 0] = output_bias(tokenizer)
        model.model.norm.weight.fill_(1.5)  # peaked enough that greedy decoding seldom gives an empty answer
        model.model.norm.weight[0] = 40.0
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model.eval()


def output_bias(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The first column of the embedding, (V,), which acts as a bias on the logits.

    Llama has no output bias. But the layers leave the first channel alone, and it is the same for every token that
    is sampled. After the last norm it is about 10 throughout, so this column of the tied output matrix shifts logits.
    """
    bias = torch.full((VOCAB_SIZE,), 0.5)
    for token_id in range(VOCAB_SIZE):
        text = tokenizer.decode([token_id])
        if text in SPECIAL_TOKENS or not (text.isascii() and (text.isprintable() or text == "\n")):
            bias[token_id] = 0.1
    bias[tokenizer.eos_token_id] = 1.3
    return bias


def main() -> None:
    """Writes model and tokenizer to the package's data folder or to `--output-dir`."""
    parser = argparse.ArgumentParser(description="Build the tiny random Llama.")
    parser.add_argument("--output-dir", type=Path, default=TINY)
    folder = parser.parse_args().output_dir
    build(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:8,d}  {path}")


def build(folder: Path) -> None:
    """Writes the model and the tokenizer to `folder`."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_model(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main()
