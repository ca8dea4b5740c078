"""Both ends of critique-revision: prompts from rows, and training rows from what became of the prompts. All pure."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from stagekit.errors import StageError
from stagekit.requests import Message
from stagekit.trainers.conversations import asked_in


Target = Literal["all", "final"]

REFUSALS = (
    "i apologize",
    "i'm sorry",
    "i am sorry",
    "sorry,",
    "i can't",
    "i cannot",
    "i can not",
    "i won't",
    "i will not",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "as an ai",
)

_LEAD_IN = re.compile(
    r"""^\s*(?:
        <\|[a-z_]+\|>\s*(?:assistant\b)?                     # role tokens: <|im_start|>assistant, <|assistant|>
      | (?:assistant|ai|response|answer)\s*:
      | \**(?:revision|(?:revised|rewritten|updated|improved|new)\s+(?:response|answer|version|reply))\**\s*:\**
      | (?:(?:sure|certainly|okay|ok|of\ course)[,.!]\s*)?
        here(?:'s|’s|\ is|\ are)\s+(?:the|a|an|my|your|one)\s+(?:\w+\s+){0,3}(?:response|answer|version|reply|revision)
        (?:\s+[^:\n.!?]{0,80})?:
    )\s*""",
    re.VERBOSE | re.IGNORECASE,
)
_CRITIQUE_LIKE = re.compile(
    r"^\W*the\s+assistant(?:'s|’s)?\s+(?:(?:last|previous|first)\s+)?(?:response|answer|reply)\b", re.I
)


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn. `revise` False: answered once, never revised.

    `source` groups prompts in metrics and stands in the rows.
    """

    messages: tuple[Message, ...]
    source: str = "prompts"
    revise: bool = True


@dataclass(frozen=True)
class Text:
    """A generated text, without white space around it; `key` finds it in the journal, raw."""

    key: str
    text: str
    truncated: bool
    new_tokens: int


@dataclass(frozen=True)
class Round:
    """One round on one prompt.

    Attributes:
        principle: the name of the principle drawn.
        critique: None where none was usable: the revision was asked for directly (`direct`), or nothing was (`drop`).
        revision: its text has known lead-ins stripped. None where nothing was generated.
        drop: why the round gives no row: `empty`, `truncated`, `error`, `too_long`; None: it gives one.
        equal: the revision is the answer that it revises.
        critique_like: the revision speaks about "the assistant's response" as a critique does.
    """

    number: int
    principle: str
    critique: Text | None
    revision: Text | None
    drop: str | None
    direct: bool = False
    equal: bool = False
    critique_like: bool = False


@dataclass(frozen=True)
class Trace:
    """All that happened to one prompt. `drop` says why nothing did: `too_long`, `empty_answer`, `error`."""

    prompt: Prompt
    initial: Text | None
    rounds: tuple[Round, ...]
    drop: str | None = None


@dataclass(frozen=True)
class Revisions:
    """One trace per prompt, in the order of the prompts (repeated prompts repeat their trace)."""

    traces: tuple[Trace, ...]
    rounds: int


def prompts_from(rows: Iterable[Mapping[str, Any]], source: str = "prompts", revise: bool = True) -> list[Prompt]:
    """Prompts from dataset rows whose `prompt` is a text or a conversation; other columns are not read.

    Raises:
        ConfigError: with every row that has no prompt, or one that does not end with the user's turn.
    """
    return [Prompt(messages, source, revise) for messages in asked_in(rows, source)]


def sft_rows(revisions: Revisions, target: Target = "all", drop_flagged: bool = False) -> list[dict[str, Any]]:
    """Rows to fine-tune on: `prompt`, `completion`, `round`, `principle`, `source`, `cai_key`.

    A truncated text gives no row: training would add an EOS where the model did not end. (There is no option to keep
    it; that would need rows of token ids without the EOS.)

    Args:
        target: "all": one row per round, as in the paper; "final": the last valid revision of each prompt.
        drop_flagged: leave out revisions that read like a critique.

    Raises:
        StageError: no revision is left; the message names the reasons.

    Source: https://huggingface.co/papers/2212.08073, section 3.1.
    """
    rows = [row for trace in revisions.traces for row in _sft(trace, target, drop_flagged)]
    if not any(row["round"] for row in rows) and (not rows or any(trace.prompt.revise for trace in revisions.traces)):
        counts = drops(revisions, target, drop_flagged)
        raise _nothing_left("row to fine-tune on", counts["sft"] + counts["unrevised"])
    return rows


def preference_rows(revisions: Revisions, drop_flagged: bool = False) -> list[dict[str, Any]]:
    """Preference pairs: `prompt`, `chosen` (last valid revision), `rejected` (first answer), `principle`, `cai_key`.

    A truncated first answer may be rejected; a truncated revision is never chosen.

    Raises:
        StageError: no pair is left; the message names the reasons.
    """
    rows = []
    for trace in revisions.traces:
        last = _last_valid(trace, drop_flagged)
        if last is None or trace.initial is None or _pair_drop(trace, drop_flagged):
            continue
        assert last.revision is not None
        rows.append(
            {
                "prompt": list(trace.prompt.messages),
                "chosen": _answer(last.revision),
                "rejected": _answer(trace.initial),
                "principle": last.principle,
                "cai_key": last.revision.key,
            }
        )
    if not rows:
        raise _nothing_left("preference pair", drops(revisions, drop_flagged=drop_flagged)["preference"])
    return rows


def drops(revisions: Revisions, target: Target = "all", drop_flagged: bool = False) -> dict[str, Counter[str]]:
    """What gave no row, counted by reason: under `sft` and `preference` for revised prompts, `unrevised` for the rest.

    With target "all", revised prompts * rounds = revised SFT rows + the sum of `sft`. With "final", and for pairs,
    revised prompts = rows + the sum. Unrevised prompts = their SFT rows + the sum of `unrevised`.
    """
    counts: dict[str, Counter[str]] = {"sft": Counter(), "unrevised": Counter(), "preference": Counter()}
    for trace in revisions.traces:
        if not trace.prompt.revise:
            counts["unrevised"].update([reason] if (reason := _unrevised_drop(trace)) else [])
            continue
        if target == "all":
            counts["sft"].update({trace.drop: revisions.rounds} if trace.drop else _round_drops(trace, drop_flagged))
        elif _last_valid(trace, drop_flagged) is None:
            counts["sft"].update([_without_row(trace, drop_flagged)])
        counts["preference"].update([reason] if (reason := _pair_drop(trace, drop_flagged)) else [])
    return counts


def metrics(revisions: Revisions) -> dict[str, float]:
    """Shares and mean lengths over all prompts, for reports: nothing here decides about a row."""
    values: dict[str, float] = {}
    rounds = [done for trace in revisions.traces for done in trace.rounds]
    for source in sorted({trace.prompt.source for trace in revisions.traces}):
        answers = [t.initial.text for t in revisions.traces if t.prompt.source == source and t.initial is not None]
        if answers:
            values[f"refusal_rate/{source}"] = fmean(is_refusal(answer) for answer in answers)
    by_role = {
        "initial": [trace.initial for trace in revisions.traces],
        "critique": [done.critique for done in rounds],
        "revision": [done.revision for done in rounds],
    }
    for role, found in by_role.items():
        texts = [text for text in found if text is not None]
        if texts:
            values[f"truncated/{role}"] = fmean(text.truncated for text in texts)
            values[f"mean_new_tokens/{role}"] = fmean(text.new_tokens for text in texts)
    revised = [done for done in rounds if done.revision is not None]
    if revised:
        values["equal_revisions"] = fmean(done.equal for done in revised)
        values["direct_revisions"] = fmean(done.direct for done in revised)
        values["critique_like_revisions"] = fmean(done.critique_like for done in revised)
    return values


def samples(revisions: Revisions, n: int) -> list[dict[str, str]]:
    """Up to `n` examples of round 1 to show: `prompt`, `answer`, `critique`, `principle`, `revision`, all texts."""
    shown = [t for t in revisions.traces if t.initial is not None and t.rounds and t.rounds[0].drop is None]
    picked = [shown[position * len(shown) // n] for position in range(n)] if len(shown) > n else shown
    return [
        {
            "prompt": _display(trace.prompt.messages),
            "answer": trace.initial.text if trace.initial else "",
            "critique": trace.rounds[0].critique.text if trace.rounds[0].critique else "",
            "principle": trace.rounds[0].principle,
            "revision": trace.rounds[0].revision.text if trace.rounds[0].revision else "",
        }
        for trace in picked
    ]


def is_refusal(text: str) -> bool:
    """Whether an answer opens as refusals do. A handful of prefixes: good for a share, not for a judgement."""
    return text.strip().lower().replace("’", "'").startswith(REFUSALS)


def strip_lead_in(text: str) -> str:
    """A revision without what announces it ("Revision:", "Here is the rewritten response:", role tokens)."""
    while (rest := _LEAD_IN.sub("", text, count=1)) != text:
        text = rest
    return text.strip()


def is_critique_like(text: str) -> bool:
    """Whether a revision opens by speaking about the assistant's response: the model wrote a critique instead."""
    return _CRITIQUE_LIKE.match(text) is not None


def _sft(trace: Trace, target: Target, drop_flagged: bool) -> Iterator[dict[str, Any]]:
    """The rows of one prompt."""
    if not trace.prompt.revise:
        if trace.initial is not None and _unrevised_drop(trace) is None:
            yield _sft_row(trace, 0, "", trace.initial)
        return
    last = _last_valid(trace, drop_flagged)
    for done in trace.rounds if target == "all" else (last,) if last is not None else ():
        if done.revision is not None and _round_drop(done, drop_flagged) is None:
            yield _sft_row(trace, done.number, done.principle, done.revision)


def _sft_row(trace: Trace, number: int, principle: str, text: Text) -> dict[str, Any]:
    return {
        "prompt": list(trace.prompt.messages),
        "completion": _answer(text),
        "round": number,
        "principle": principle,
        "source": trace.prompt.source,
        "cai_key": text.key,
    }


def _answer(text: Text) -> list[Message]:
    return [{"role": "assistant", "content": text.text}]


def _unrevised_drop(trace: Trace) -> str | None:
    """Why a prompt that is only answered gives no row."""
    if trace.drop is None and trace.initial is not None and trace.initial.truncated:
        return "truncated"
    return trace.drop


def _round_drop(done: Round, drop_flagged: bool) -> str | None:
    return "critique_like" if done.drop is None and drop_flagged and done.critique_like else done.drop


def _round_drops(trace: Trace, drop_flagged: bool) -> list[str]:
    return [reason for done in trace.rounds if (reason := _round_drop(done, drop_flagged))]


def _last_valid(trace: Trace, drop_flagged: bool) -> Round | None:
    return next((done for done in reversed(trace.rounds) if _round_drop(done, drop_flagged) is None), None)


def _without_row(trace: Trace, drop_flagged: bool) -> str:
    """The reason of a prompt without a valid revision: its own, or that of its last round."""
    reason = trace.drop or _round_drop(trace.rounds[-1], drop_flagged)
    assert reason is not None, f"a prompt without a valid revision and without a reason: {trace}"
    return reason


def _pair_drop(trace: Trace, drop_flagged: bool) -> str | None:
    """Why a prompt gives no preference pair."""
    if not trace.prompt.revise:
        return "unrevised"
    last = _last_valid(trace, drop_flagged)
    if last is None:
        return _without_row(trace, drop_flagged)
    assert last.revision is not None and trace.initial is not None
    return "equal" if last.revision.text == trace.initial.text else None


def _display(messages: Sequence[Message]) -> str:
    """A single turn as its text; a conversation with its roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _nothing_left(what: str, counts: Counter[str]) -> StageError:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.most_common()) or "no prompts"
    return StageError(
        f"critique-revision left no {what} ({reasons}). Raise max_new_tokens if most are truncated; shorten prompts "
        "or take a model with more context if they are too_long; use a stronger model or other principles if they are "
        "empty or equal."
    )
