"""Copies and near copies: exactly those that comparing all pairs finds, with far fewer comparisons."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagekit.duplicates import Copy, Index, copies, jaccard, normalised, shingles


def brute_force(texts: list[str], known: list[str], similarity: float, ngram: int) -> list[Copy | None]:
    """The definition, pair by pair."""
    kept = [Copy(known=True, place=place, exact=False) for place in range(len(known))]
    said = list(known)
    found: list[Copy | None] = []
    for place, text in enumerate(texts):
        exact = [one for one, other in zip(kept, said, strict=True) if normalised(other) == normalised(text)]
        alike = [
            one
            for one, other in zip(kept, said, strict=True)
            if jaccard(shingles(text, ngram), shingles(other, ngram)) >= similarity
        ]
        copy = exact[0]._replace(exact=True) if exact else alike[0] if alike else None
        if copy is None:
            kept.append(Copy(known=False, place=place, exact=False))
            said.append(text)
        found.append(copy)
    return found


FEW_WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "A", ","]), min_size=1, max_size=12).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(FEW_WORDS, max_size=12),
    known=st.lists(FEW_WORDS, max_size=4),
    similarity=st.sampled_from([0.1, 1 / 3, 0.5, 0.6, 2 / 3, 0.7, 0.75, 0.9, 1.0]),
    ngram=st.integers(1, 5),
)
def test_the_copies_are_those_that_comparing_all_pairs_finds(
    texts: list[str], known: list[str], similarity: float, ngram: int
) -> None:
    assert copies(texts, known, similarity=similarity, ngram=ngram) == brute_force(texts, known, similarity, ngram)


def test_the_first_of_its_kind_is_kept_and_the_known_ones_come_first() -> None:
    texts = ["Name a fruit.", "name  a FRUIT.", "Is the earth round?", "Is the earth round ?", "What is ice made of?"]
    found = copies(texts, ["What is ice made of?"])
    assert found == [
        None,
        Copy(known=False, place=0, exact=True),
        None,
        Copy(known=False, place=2, exact=False),  # the same words, another white space
        Copy(known=True, place=0, exact=True),
    ]


def test_a_text_that_is_one_word_longer_is_a_near_copy_and_one_of_another_word_is_none() -> None:
    words = [f"word{number}" for number in range(20)]
    one, longer = " ".join(words), " ".join([*words, "more"])
    other = " ".join([*words[:10], "other", *words[11:]])
    assert jaccard(shingles(one, 5), shingles(longer, 5)) == 16 / 17
    assert jaccard(shingles(one, 5), shingles(other, 5)) == 11 / 21
    assert copies([one, longer, other]) == [None, Copy(known=False, place=0, exact=False), None]


def test_a_sign_is_a_word_so_that_a_sum_is_no_copy_of_a_difference() -> None:
    assert copies(["What is 12 + 3?", "What is 12 - 3?"], similarity=0.5, ngram=2) == [None, None]


def test_without_a_similarity_only_the_same_text_is_a_copy() -> None:
    texts = ["a b c d e f g", "a b c d e f g h", "A b c d e f g"]
    assert copies(texts, similarity=None) == [None, None, Copy(known=False, place=0, exact=True)]
    assert copies(texts, similarity=0.8)[1] is None  # 3 of 4 n-grams are shared
    assert copies(texts, similarity=0.75)[1] == Copy(known=False, place=0, exact=False)


@pytest.mark.parametrize(("text", "expected"), [("", 0), (" \n", 0), ("one two", 1), ("我喜欢苹果和梨", 3)])
def test_short_texts_and_scripts_without_spaces_have_shingles_too(text: str, expected: int) -> None:
    assert len(shingles(text, 5)) == expected


def test_many_texts_of_one_template_are_not_compared_pair_by_pair() -> None:
    rng = Random(1)
    names = [f"thing{number}" for number in range(4000)]
    texts = [
        f"Write a short and friendly note about {rng.choice(names)} and {rng.choice(names)} for the people at work."
        for _ in range(8000)
    ]
    index = Index(0.7, 5, texts)
    kept = 0
    for text in texts:
        if index.find(text) is None:
            index.add(text)
            kept += 1
    assert kept > 7000
    assert index.compared < 4 * len(texts)  # all pairs would be 32 million
