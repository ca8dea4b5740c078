"""Counter-based draws are fixed by their names."""

from stagekit.counters import digest_of, draw, seed_of


def test_a_draw_depends_on_the_seed_and_on_every_part() -> None:
    again = [draw(1, "a", "b") for _ in range(2)]
    assert len(set(again)) == 1
    assert len({*again, draw(2, "a", "b"), draw(1, "a", "c"), draw(1, "ab"), draw(1, "b", "a")}) == 5


def test_draws_lie_in_the_unit_interval_and_average_one_half() -> None:
    draws = [draw(0, str(number)) for number in range(4000)]
    assert all(0 <= number < 1 for number in draws)
    assert abs(sum(draws) / 4000 - 0.5) < 0.02  # standard error 0.0046


def test_a_seed_has_63_bits() -> None:
    seeds = [seed_of(0, str(number)) for number in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert any(seed >= 2**62 for seed in seeds)


def test_a_digest_does_not_depend_on_the_order_of_keys_and_takes_any_text() -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of("\ud800") != digest_of("?")
