"""Which of many texts say again what an earlier one says: exactly, or nearly by the n-grams of words that they share.

The first of its kind is kept, in the order given, so the result depends on nothing else. Near copies are found
exactly, not by sketches, and without comparing all pairs: two sets whose Jaccard similarity is at least t share an
element of their prefixes, the |x| - ceil(t |x|) + 1 rarest elements of each, so only texts with a rare n-gram in
common are compared.

Source: prefix filtering as in Bayardo, Ma and Srikant, Scaling Up All Pairs Similarity Search, WWW 2007, section 4.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple


Shingle = tuple[str, ...]

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
_ROUNDING = 1e-9


class Copy(NamedTuple):
    """What a text repeats: `place` among the texts known before (`known`) or among those given; and whether it is the
    same text (`exact`) or one like it."""

    known: bool
    place: int
    exact: bool


def normalised(text: str) -> str:
    """A text without what tells no two texts apart: width and form of characters, case, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str, ngram: int) -> frozenset[Shingle]:
    """The n-grams of a text's words and punctuation marks; a text with fewer is one shingle as a whole. Characters of
    scripts without spaces (Chinese, Japanese, Korean) are words by themselves."""
    words = _WORD.findall(normalised(text))
    if len(words) <= ngram:
        return frozenset({tuple(words)}) if words else frozenset()
    return frozenset(tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1))


def jaccard(one: frozenset[Shingle], other: frozenset[Shingle]) -> float:
    """Shared elements over all elements; 0 of two empty sets."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if shared else 0.0


class Index:
    """Texts that are kept, to be asked whether a new one is like one of them.

    Attributes:
        compared: pairs of texts whose similarity was worked out so far.
    """

    def __init__(self, similarity: float, ngram: int, texts: Iterable[str]) -> None:
        """`texts` are those that will be asked about: which n-grams are rare among them decides how fast it is."""
        self.similarity, self.ngram = similarity, ngram
        self.compared = 0
        self._frequency: Counter[Shingle] = Counter()
        for text in texts:
            self._frequency.update(shingles(text, ngram))
        self._kept: list[frozenset[Shingle]] = []
        self._holders: dict[Shingle, list[int]] = defaultdict(list)

    def find(self, text: str) -> int | None:
        """The place, in the order of adding, of the first kept text that is at least as similar as asked for."""
        mine = shingles(text, self.ngram)
        places = {place for shingle in self._prefix(mine) for place in self._holders.get(shingle, ())}
        for place in sorted(places):
            other = self._kept[place]
            shorter, longer = sorted((len(mine), len(other)))
            if shorter < self.similarity * longer - _ROUNDING:
                continue
            self.compared += 1
            if jaccard(mine, other) >= self.similarity:
                return place
        return None

    def add(self, text: str) -> None:
        """Keep a text."""
        mine = shingles(text, self.ngram)
        for shingle in self._prefix(mine):
            self._holders[shingle].append(len(self._kept))
        self._kept.append(mine)

    def _prefix(self, mine: frozenset[Shingle]) -> list[Shingle]:
        """The rarest n-grams, as many as one of them must be shared by whatever is similar enough."""
        needed = max(1, math.ceil(self.similarity * len(mine) - _ROUNDING))
        return sorted(mine, key=lambda shingle: (self._frequency[shingle], shingle))[: len(mine) - needed + 1]


def copies(
    texts: Sequence[str], known: Sequence[str] = (), *, similarity: float | None = 0.7, ngram: int = 5
) -> list[Copy | None]:
    """For each text what it repeats: one of `known`, or an earlier text that repeats nothing itself; None: nothing.

    A text that is the same as another, normalised, is an exact copy; otherwise the first that is similar counts,
    `known` before the others.

    Args:
        similarity: the Jaccard similarity of their n-grams from which two texts count as alike, above 0; None: only
            exact copies count.
        ngram: how many words an n-gram has.
    """
    same: dict[str, Copy] = {}
    for place, text in enumerate(known):
        same.setdefault(normalised(text), Copy(known=True, place=place, exact=True))
    index = None if similarity is None else Index(similarity, ngram, [*known, *texts])
    kept = [Copy(known=True, place=place, exact=False) for place in range(len(known))]
    if index is not None:
        for text in known:
            index.add(text)
    found: list[Copy | None] = []
    for place, text in enumerate(texts):
        copy = same.get(normalised(text))
        if copy is None and index is not None and (at := index.find(text)) is not None:
            copy = kept[at]
        if copy is None:
            same[normalised(text)] = Copy(known=False, place=place, exact=True)
            kept.append(Copy(known=False, place=place, exact=False))
            if index is not None:
                index.add(text)
        found.append(copy)
    return found
