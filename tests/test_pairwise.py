"""The generator of cases: every pair, no case that is refused, and few of them."""

import itertools

from tests.pairwise import cover

OPTIONS = {"a": "uvwxyz", "b": "uvwxy", "c": "uv", "d": "uvw", "e": "uv", "f": "uv"}


def pairs_of(case: dict[str, str]) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(two) for two in itertools.combinations(case.items(), 2)}


def test_every_pair_that_some_allowed_case_has_is_covered() -> None:
    """By brute force over all cases; a rule of three options hides in none of their pairs."""
    rules = [
        lambda a, b: (a, b) not in {("u", "v"), ("z", "y")},
        lambda c, d: (c, d) != ("v", "w"),
        lambda d, e, f: d == "w" or e == "u" or f == "u",
        lambda e, c: e == "u" or c == "u",
    ]

    def is_allowed(case: dict[str, str]) -> bool:
        named = [{n: case[n] for n in rule.__code__.co_varnames} for rule in rules]
        return all(rule(**args) for rule, args in zip(rules, named, strict=True))

    every = [dict(zip(OPTIONS, v, strict=True)) for v in itertools.product(*OPTIONS.values())]
    possible = set().union(*(pairs_of(case) for case in every if is_allowed(case)))
    cases = cover(OPTIONS, rules=rules)
    assert all(map(is_allowed, cases))
    assert set().union(*map(pairs_of, cases)) == possible
    # The two options with the most values have 30 pairs, of which 28 are allowed.
    assert 28 <= len(cases) <= 36
    assert cover(OPTIONS, rules=rules) == cases
