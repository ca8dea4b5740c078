"""How many rows a mixture takes of each of its sets."""

import math
from collections.abc import Mapping
from fractions import Fraction


def mixing_counts(lengths: Mapping[str, int], ratios: Mapping[str, float], limit: int | None = None) -> dict[str, int]:
    """Rows of each set, in exactly the given ratios, none used twice.

    N = min over the sets of floor(rows / weight), the weights normalised to 1, and `limit` at most; the counts add up
    to N by largest remainder (ties: the earlier name).
    """
    weights = {name: Fraction(repr(float(ratios[name]))) for name in lengths}
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    rows = min(math.floor(lengths[name] / share) for name, share in shares.items())
    rows = rows if limit is None else min(rows, limit)
    counts = {name: math.floor(rows * share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - rows * shares[name])
    for name in by_remainder[: rows - sum(counts.values())]:
        counts[name] += 1
    return counts
