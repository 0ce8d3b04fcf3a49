"""Few cases that cover every pair of values of every two options, generated.

Most faults show in a pair of options (Kuhn, Wallace and Gallo, "Software fault interactions and
implications for software testing", 2004), and a set that covers all pairs is hardly larger than
the product of the two options with the most values. Greedy, as AETG (Cohen et al., 1997), and the
same on every machine.
"""

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Pair = frozenset[tuple[str, int]]  # (an option, the index of its value), twice
_NUM_TRIED = 8


def cover(
    options: Mapping[str, Sequence[Any]], *, rules: Sequence[Callable[..., bool]] = ()
) -> list[Case]:
    """Makes cases that between them have every pair of values that the rules allow.

    Args:
      options: The values of each option.
      rules: Functions of some options, by their names, that tell whether a case may have the values
        together. A pair is left out only if no case with it is allowed.

    >>> cases = cover({"a": "xy", "b": "xy", "c": "xy"}, rules=[lambda a, b: a + b != "yy"])
    >>> len(cases), any(case["a"] + case["b"] == "yy" for case in cases)
    (5, False)
    """
    checks = [(frozenset(inspect.signature(rule).parameters), rule) for rule in rules]
    wanted = dict.fromkeys(  # in place of a set, for its order
        frozenset([(one, i), (other, j)])
        for one, other in itertools.combinations(options, 2)
        for i, j in itertools.product(range(len(options[one])), range(len(options[other])))
    )

    had: Counter[tuple[str, int]] = Counter()

    def complete(places: dict[str, int], new: Sequence[str]) -> dict[str, int] | None:
        """Adds the other options, each with the value that covers the most, or goes back."""
        case = {name: options[name][place] for name, place in places.items()}
        for names, rule in checks:
            is_new = names <= case.keys() and not names.isdisjoint(new)
            if is_new and not rule(**{name: case[name] for name in names}):
                return None
        if len(places) == len(options):
            return places
        name = next(name for name in options if name not in places)

        def gain(place: int) -> tuple[int, int]:
            pairs = [frozenset([(name, place), each]) for each in places.items()]
            # Among values that cover as much, the one that was used least.
            return sum(pair in wanted for pair in pairs), -had[name, place]

        for place in sorted(range(len(options[name])), key=gain, reverse=True):
            done = complete({**places, name: place}, [name])
            if done is not None:
                return done
        return None

    cases = []
    while wanted:
        found = {}
        for pair in list(wanted)[:_NUM_TRIED]:
            places = complete(dict(pair), [name for name, _ in pair])
            if places is None:
                del wanted[pair]
            else:
                found[pair] = places
        if not found:
            continue
        best = max(found.values(), key=lambda places: len(_pairs(places) & wanted.keys()))
        for pair in _pairs(best) & wanted.keys():
            del wanted[pair]
        had.update(best.items())
        cases.append({name: options[name][best[name]] for name in options})
    return cases


def _pairs(places: Mapping[str, int]) -> set[Pair]:
    return {frozenset(two) for two in itertools.combinations(places.items(), 2)}
