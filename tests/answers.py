"""Functions that tests name as `tests.answers:NAME`."""

from typing import Any


def short(messages: Any) -> str:
    """A scripted model."""
    return f"Reply {len(messages)} to {messages[0]['content']}"


def first_example(messages: Any) -> str:
    """A scripted teacher: the first of the examples, a little longer; anything else it repeats after itself."""
    first = next((line for line in messages[0]["content"].splitlines() if line.startswith("1. ")), None)
    return f"Say it twice: {messages[0]['content']}" if first is None else f"{first} Say all that you know of it."


def doubled(dataset: Any, split: str) -> Any:
    """A preprocessor: every row twice."""
    from datasets import concatenate_datasets

    return concatenate_datasets([dataset, dataset])


def custom(context: Any) -> dict[str, Any]:
    """A custom stage that looks at all it is given."""
    path = context.output_dir / "own.jsonl"
    path.write_text('{"text": "Hello there, how are you?"}\n' * 4)
    return {"metrics": {"rows": len(context.train_dataset or [])}, "datasets": {"own": path}, "policy": context.model}


def by_length(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """A reward: the number of characters of an answer."""
    return [float(len(text if isinstance(text, str) else text[0]["content"])) for text in completions]


def likes_longer(prompts: Any, first: Any, second: Any) -> list[float]:
    """A judge: the longer response is the better one."""
    return [(len(one) > len(other)) + 0.5 * (len(one) == len(other)) for one, other in zip(first, second, strict=True)]


def by_shortness(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """A reward: above 0, and the higher the fewer characters an answer has."""
    return [1 / (1 + length) for length in by_length(prompts, completions)]
