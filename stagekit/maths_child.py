"""The program that compares mathematical answers with math-verify; started by `stagekit.maths`.

An answer such as 9^9^9^9 keeps sympy busy for ever, in arithmetic that no signal handler of Python interrupts, so the
comparison has a process of its own: the kernel ends it when a comparison has used up its CPU time. It reads a line of
JSON per comparison, and writes `gold` once it has read the right answer, then whether the other is equal.
"""

import json
import logging
import math
import re
import resource
import sys
import time
from functools import lru_cache
from typing import Any


_MEMORY = 4 << 30
_DELIMITED = re.compile(r"\\(boxed|fbox|\(|\[|begin\{(equation|align))|(?<!\\)\$.+(?<!\\)\$", re.DOTALL)
"""What says where the mathematics of a text are; one dollar alone is money."""


def main() -> None:
    """Compare until the standard input ends."""
    request = json.loads(sys.stdin.readline())
    sys.path[:] = request["path"]
    sys.set_int_max_str_digits(0)  # else math-verify calls a number unreadable that only is long
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from math_verify import verify

    # after the import: what it maps is no part of what an answer may take
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    read = lru_cache(maxsize=256)(_read)
    _say("ready")
    for line in sys.stdin:
        one = json.loads(line)
        until = math.ceil(time.process_time() + one["seconds"])
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        gold = read(one["gold"], True, False)
        _say("gold" if gold else "none")
        if gold:
            said = _read(one["said"], one["whole"], one["boxed"])
            _say("equal" if said and verify(gold, said, timeout_seconds=None) else "other")


def _read(text: str, whole: bool, boxed: bool) -> list[Any]:
    """The mathematics of a text; empty where there are none.

    Args:
        text: The text.
        whole: Whether all of it is the answer, also without something that delimits mathematics.
        boxed: Whether only what stands in a box counts.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    given = text.strip()
    if whole and given and _DELIMITED.search(given) is None:
        given = "\\boxed{" + _escaped(given) + "}"
    if boxed and "\\boxed" not in given and "\\fbox" not in given:
        return []
    latex = LatexExtractionConfig(boxed_match_priority=0)
    kinds = [latex] if boxed else [latex, ExprExtractionConfig()]
    return list(parse(given, kinds, fallback_mode="no_fallback", parsing_timeout=None))


def _escaped(text: str) -> str:
    """A bare % would begin a comment, a bare dollar mathematics."""
    return text.replace("\\%", "%").replace("%", "\\%").replace("\\$", "").replace("$", "")


def _say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
