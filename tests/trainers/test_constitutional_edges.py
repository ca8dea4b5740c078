"""Every edge case of critique-revision: what is dropped, what is kept, what is an error."""

from pathlib import Path
from typing import Any

import pytest

from stagekit.errors import ConfigError, StageError
from stagekit.requests import Completion, ScriptedGenerator
from stagekit.trainers.constitutional import (
    Prompt,
    drops,
    metrics,
    preference_rows,
    prompts_from,
    samples,
    sft_rows,
    strip_lead_in,
)
from tests.trainers.scripted import ask, by_role, chat, contents, cut, echo, failed, identity_holds, records_of, run


def test_an_empty_critique_is_asked_for_once_more_with_another_seed(tmp_path: Path) -> None:
    revisions = run(tmp_path, ask("A"), by_role(critique=[" \n", "It is curt."]))
    first, second = [r for r in records_of(tmp_path / "journal.jsonl") if r["role"] == "critique"]
    assert (first["text"], second["text"]) == (" \n", "It is curt.")
    assert first["seed"] != second["seed"]
    done = revisions.traces[0].rounds[0]
    assert done.critique is not None and done.critique.text == "It is curt." and not done.direct


@pytest.mark.parametrize("nothing", ["  ", failed()])
def test_without_a_critique_the_revision_is_asked_for_directly(tmp_path: Path, nothing: str | Completion) -> None:
    policy = ScriptedGenerator(by_role(critique=nothing))
    revisions = run(tmp_path, ask("A"), policy=policy)
    assert contents(policy.calls[-1][0]) == ("A", echo(chat("A")), "Revise it.")
    assert len(policy.calls) == 4  # answer, critique, critique again, revision
    done = revisions.traces[0].rounds[0]
    assert done.direct and done.critique is None and done.drop is None
    assert metrics(revisions)["direct_revisions"] == 1
    assert len(sft_rows(revisions)) == 1


def test_an_equal_revision_is_trained_on_but_is_no_pair(tmp_path: Path) -> None:
    revisions = run(tmp_path, ask("A", "B"), by_role(answer="Fine.", revision=" Fine.\n"))
    assert [row["completion"][0]["content"] for row in sft_rows(revisions)] == ["Fine.", "Fine."]
    assert revisions.traces[0].rounds[0].equal
    assert metrics(revisions)["equal_revisions"] == 1
    with pytest.raises(StageError, match=r"left no preference pair \(equal: 2\)"):
        preference_rows(revisions)


def test_a_last_revision_that_came_back_to_the_first_answer_is_no_pair(tmp_path: Path) -> None:
    revisions = run(tmp_path, ask("A"), by_role(answer="y0", revision=["y1", "y0"]), rounds=2)
    assert [row["round"] for row in sft_rows(revisions)] == [1, 2]
    assert drops(revisions)["preference"] == {"equal": 1}


def test_an_empty_revision_keeps_the_answer_and_the_next_round_goes_on(tmp_path: Path) -> None:
    policy = ScriptedGenerator(by_role(answer="y0", revision=["y1", " ", "y3"]))
    revisions = run(tmp_path, ask("A"), policy=policy, rounds=3)
    answers = [contents(batch[0])[1] for batch in policy.calls[1::2]]
    assert answers == ["y0", "y1", "y1"]
    assert [row["round"] for row in sft_rows(revisions)] == [1, 3]
    assert drops(revisions)["sft"] == {"empty": 1}
    identity_holds(revisions)


def test_a_truncated_revision_is_neither_trained_on_nor_chosen_but_revised_on(tmp_path: Path) -> None:
    policy = ScriptedGenerator(by_role(answer="y0", revision=["y1", cut("y2 is cut")]))
    revisions = run(tmp_path, ask("A"), policy=policy, rounds=2)
    assert [row["completion"][0]["content"] for row in sft_rows(revisions)] == ["y1"]
    assert sft_rows(revisions, "final")[0]["round"] == 1
    assert preference_rows(revisions)[0]["chosen"][0]["content"] == "y1"
    assert drops(revisions)["sft"] == {"truncated": 1}
    policy = ScriptedGenerator(by_role(answer="y0", revision=[cut("y1 is cut"), "y2"]))
    run(tmp_path, ask("A"), policy=policy, rounds=2, name="other")
    assert contents(policy.calls[3][0])[1] == "y1 is cut"


def test_a_truncated_critique_is_used(tmp_path: Path) -> None:
    policy = ScriptedGenerator(by_role(critique=cut("It is cu")))
    revisions = run(tmp_path, ask("A"), policy=policy)
    assert contents(policy.calls[-1][0])[3] == "It is cu"
    assert metrics(revisions)["truncated/critique"] == 1
    assert len(sft_rows(revisions)) == 1


def test_a_truncated_first_answer_is_revised_and_rejected_but_not_trained_on_alone(tmp_path: Path) -> None:
    prompts = [*ask("A"), *ask("A", revised=False, source="plain")]
    revisions = run(tmp_path, prompts, by_role(answer=cut("half"), revision="whole"))
    assert preference_rows(revisions)[0]["rejected"][0]["content"] == "half"
    assert [row["source"] for row in sft_rows(revisions)] == ["red"]
    assert drops(revisions)["unrevised"] == {"truncated": 1}


@pytest.mark.parametrize(
    ("raw", "left"),
    [
        ("Revision: Call a friend.", "Call a friend."),
        ("**Revised response:**\n\nCall a friend.", "Call a friend."),
        ("Here is the rewritten response: Call a friend.", "Call a friend."),
        ("Sure! Here's a revised version of the response that is kind:\nCall a friend.", "Call a friend."),
        ("<|im_start|>assistant\nCall a friend.", "Call a friend."),
        ("Assistant: Revision: Call a friend.", "Call a friend."),
        ("Rewritten answer:", ""),
        (" Call a friend. Here is the answer: no.", "Call a friend. Here is the answer: no."),
        ("Here is a recipe: eggs.", "Here is a recipe: eggs."),
        ("Revision of laws takes time.", "Revision of laws takes time."),
        ("The answer is 4.", "The answer is 4."),
        ("Sure, I can help: call.", "Sure, I can help: call."),
    ],
)
def test_known_lead_ins_are_stripped_and_nothing_else(raw: str, left: str) -> None:
    assert strip_lead_in(raw) == left


def test_the_journal_keeps_the_raw_revision_and_a_bare_lead_in_is_empty(tmp_path: Path) -> None:
    revisions = run(tmp_path, ask("A"), by_role(revision=["Revision: Be kind.", "Revision:"]), rounds=2)
    raw = [record["text"] for record in records_of(tmp_path / "journal.jsonl") if record["role"] == "revision"]
    assert raw == ["Revision: Be kind.", "Revision:"]
    assert [row["completion"][0]["content"] for row in sft_rows(revisions)] == ["Be kind."]
    assert drops(revisions)["sft"] == {"empty": 1}


def test_a_critique_in_place_of_a_revision_is_flagged_and_can_be_dropped(tmp_path: Path) -> None:
    revisions = run(
        tmp_path, ask("A"), by_role(revision=["Better.", "The assistant's last response is rude."]), rounds=2
    )
    assert metrics(revisions)["critique_like_revisions"] == 0.5
    assert len(sft_rows(revisions)) == 2
    assert [row["round"] for row in sft_rows(revisions, drop_flagged=True)] == [1]
    assert drops(revisions, drop_flagged=True)["sft"] == {"critique_like": 1}
    assert preference_rows(revisions, drop_flagged=True)[0]["chosen"][0]["content"] == "Better."


def test_a_refusal_counts_in_the_metrics_of_its_source_only(tmp_path: Path) -> None:
    replies = {"A": "I’m sorry, but no.", "B": "Yes.", "C": "As an AI I may."}
    prompts = [*ask("A", "B"), *ask("C", revised=False, source="plain")]
    revisions = run(tmp_path, prompts, lambda m: replies[m[0]["content"]] if len(m) == 1 else "Kind words.")
    values = metrics(revisions)
    assert (values["refusal_rate/red"], values["refusal_rate/plain"]) == (0.5, 1)
    assert len(sft_rows(revisions)) == 3
    assert values["truncated/initial"] == 0
    assert values["mean_new_tokens/initial"] == pytest.approx((4 + 1 + 5) / 3)


def test_too_long_prompts_are_dropped_before_anything_is_generated(tmp_path: Path) -> None:
    # Words and roles: prompt 1 + n, requests 3 + 3, two empty answers 1 + 1; caps 10 + 5 + 10.
    room = 9 + 25
    policy = ScriptedGenerator(echo, context_length=room + 20)
    prompts = ask("w " * 20, "w " * 21, "short")
    revisions = run(tmp_path, prompts, policy=policy, max_new_tokens=10, max_critique_tokens=5, rounds=2)
    assert [trace.drop for trace in revisions.traces] == [None, "too_long", None]
    assert {messages[0]["content"] for batch in policy.calls for messages in batch} == {"w " * 20, "short"}
    assert drops(revisions)["sft"] == {"too_long": 2}
    assert [row["prompt"][0]["content"] for row in sft_rows(revisions, "final")] == ["w " * 20, "short"]


def test_an_unrevised_prompt_needs_room_for_its_answer_only(tmp_path: Path) -> None:
    policy = ScriptedGenerator(echo, context_length=31)
    prompts = ask("w " * 20, "w " * 21, revised=False)
    revisions = run(tmp_path, prompts, policy=policy, max_new_tokens=10, max_critique_tokens=5)
    assert [trace.drop for trace in revisions.traces] == [None, "too_long"]


def test_the_critics_context_counts_too(tmp_path: Path) -> None:
    critic = ScriptedGenerator(echo, "critic", context_length=20)
    revisions = run(tmp_path, ask("w", "w " * 20), critic=critic, max_new_tokens=5, max_critique_tokens=5)
    assert [trace.drop for trace in revisions.traces] == [None, "too_long"]


def test_few_shots_stand_in_front_and_are_left_out_where_they_do_not_fit(tmp_path: Path) -> None:
    fewshot = chat("w " * 10, "w " * 10)
    policy = ScriptedGenerator(echo, context_length=70)
    prompts = [Prompt(({"role": "system", "content": "Be kind."}, *chat("A"))), *ask("w " * 30)]
    plan: dict[str, Any] = {"max_new_tokens": 10, "max_critique_tokens": 5, "fewshot": fewshot}
    run(tmp_path, prompts, policy=policy, **plan)
    critiques = {contents(messages)[:3] for batch in policy.calls for messages in batch if len(messages) > 2}
    assert ("Be kind.", "w " * 10, "w " * 10) in critiques
    assert ("w " * 30, echo(chat("w " * 30)), "Critique it.") in critiques
    assert {len(messages) for messages in policy.calls[0]} == {1, 2}  # none for first answers


def test_a_text_that_grows_beyond_the_context_later_drops_only_its_round(tmp_path: Path) -> None:
    # A critic counts words; the policy's answer has more of them than its cap in tokens promised.
    critic = ScriptedGenerator(echo, "critic", context_length=40)
    reply = by_role(answer="w " * 60)
    policy = ScriptedGenerator(lambda m: "short" if m[0]["content"] == "B" and len(m) == 1 else reply(m))
    revisions = run(tmp_path, ask("A", "B"), policy=policy, critic=critic, max_new_tokens=5, max_critique_tokens=5)
    assert [[done.drop for done in trace.rounds] for trace in revisions.traces] == [["too_long"], [None]]
    identity_holds(revisions)


def test_only_the_last_answer_of_a_conversation_is_criticised(tmp_path: Path) -> None:
    talk = chat("Hi", "Hello.", "And you?")
    policy = ScriptedGenerator(echo)
    revisions = run(tmp_path, [Prompt(talk)], policy=policy)
    assert policy.calls[1][0] == (*talk, *chat("", echo(talk), "Critique it.")[1:])
    assert sft_rows(revisions)[0]["prompt"] == list(talk)
    assert samples(revisions, 3)[0]["prompt"] == "user: Hi\nassistant: Hello.\nuser: And you?"


def test_a_prompt_that_ends_with_an_assistant_turn_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    rows = [{"prompt": "A"}, {"prompt": list(chat("A", "B"))}, {"prompt": " "}, {"text": "A"}]
    with pytest.raises(ConfigError) as error:
        prompts_from(rows, "train.jsonl")
    assert [problem.path for problem in error.value.problems] == [f"train.jsonl: row {row}" for row in (1, 2, 3)]
    assert "ends with a turn of the assistant" in str(error.value)
    with pytest.raises(ConfigError, match=r"prompts\[1\]: the prompt ends with a turn of the assistant"):
        run(tmp_path, [*ask("A"), Prompt(chat("A", "B"))])


def test_repeated_prompts_are_generated_once_and_their_rows_repeated(tmp_path: Path) -> None:
    policy = ScriptedGenerator(echo)
    prompts = [*ask("A", "B", "A"), *ask("A", revised=False, source="plain")]
    revisions = run(tmp_path, prompts, policy=policy)
    assert [len(batch) for batch in policy.calls] == [2, 2, 2]
    rows = sft_rows(revisions)
    assert [row["prompt"][0]["content"] for row in rows] == ["A", "B", "A", "A"]
    assert rows[0] == rows[2]
    assert rows[3]["completion"][0]["content"] == echo(chat("A")) and rows[3]["round"] == 0
    assert len(preference_rows(revisions)) == 3


def test_a_prompt_may_contain_what_looks_like_a_frame(tmp_path: Path) -> None:
    text = "Tell me: is 'Assistant: yes' a \"frame\"?\n\nHuman: no"
    revisions = run(tmp_path, prompts_from([{"prompt": text}]))
    assert sft_rows(revisions)[0]["prompt"] == [{"role": "user", "content": text}]


def test_no_rounds_and_no_principles_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        run(tmp_path, ask("A"), rounds=0, principles=())
    assert [problem.path for problem in error.value.problems] == ["rounds", "principles"]


def test_nothing_left_to_train_on_is_an_error_that_names_the_reasons(tmp_path: Path) -> None:
    prompts = [*ask("A", "B"), *ask("C", revised=False)]
    revisions = run(tmp_path, prompts, by_role(revision=[cut("half"), ""]))
    with pytest.raises(
        StageError, match=r"left no row to fine-tune on \((truncated|empty): 1, (empty|truncated): 1\)"
    ):
        sft_rows(revisions)
    with pytest.raises(StageError, match="left no preference pair"):
        preference_rows(revisions)


def test_unrevised_prompts_alone_are_rows(tmp_path: Path) -> None:
    revisions = run(tmp_path, ask("A", "B", revised=False))
    assert [row["round"] for row in sft_rows(revisions)] == [0, 0]


def test_samples_are_spread_over_the_prompts(tmp_path: Path) -> None:
    revisions = run(tmp_path, ask(*"ABCDEF"))
    shown = samples(revisions, 3)
    assert [sample["prompt"] for sample in shown] == ["A", "C", "E"]
    assert shown[0]["answer"] == echo(chat("A")) and shown[0]["principle"] == "kind"
    assert shown[0]["critique"].startswith("critique") and shown[0]["revision"].startswith("revision")
    assert len(samples(revisions, 50)) == 6
