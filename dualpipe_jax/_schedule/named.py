"""A schedule's name -> its program. A name has the options in brackets that are not the defaults.

>>> program = generate("interleaved-1f1b", num_ranks=2, num_microbatches=4, num_stages_per_rank=3)
>>> program.name, base_name(program.name), read_name(program.name)
('interleaved-1f1b(num_stages_per_rank=3)', 'interleaved-1f1b',
    ('interleaved-1f1b', {'num_stages_per_rank': 3}))
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dualpipe_jax._errors import brief
from dualpipe_jax._schedule.generators import GENERATORS
from dualpipe_jax._schedule.ir import Program

# A name, and options in brackets; an option, whose value is a word or integers in brackets.
_NAME = re.compile(r"([\w-]+)(?:\((.*)\))?")
_OPTION = re.compile(r"(\w+)=(\w+|\([0-9]+(?:, ?[0-9]+)*\))")
_INTEGER = re.compile("[0-9]{1,18}")
_STAGES = "num_stages_per_rank"
# The values that `choose` tries: more stages a rank wait less and transfer more; as many deferred
# weight grads as twice the rank pay where input grads take longer than forwards.
_WORTH_A_TRY: dict[str, tuple[Any, ...]] = {_STAGES: (2, 4), "num_deferred": ("r", "2r")}


def generate(name: str, **arguments: Any) -> Program:
    """Makes a program under a name that says with which options it was made.

    Args:
        name: One of `GENERATORS`.
        **arguments: As its generator takes them.
    """
    program = GENERATORS[name](**arguments)
    options = {option: arguments[option] for option in options_of(name) if option in arguments}
    return replace(program, name=_write_name(name, options))


def options_of(name: str) -> dict[str, Any]:
    """Lists the options that a schedule has beside its sizes, with their defaults.

    >>> options_of("interleaved-zb"), options_of("zb-h1")
    ({'num_stages_per_rank': 2, 'num_deferred': 'r'}, {})
    """
    parameters = inspect.signature(GENERATORS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def variants_of(name: str, *, num_ranks: int, num_layers: int) -> tuple[str, ...]:
    """Lists a schedule with each of the options that are worth a try, its defaults first.

    >>> variants_of("interleaved-1f1b", num_ranks=8, num_layers=64)
    ('interleaved-1f1b', 'interleaved-1f1b(num_stages_per_rank=4)')
    >>> variants_of("interleaved-1f1b(num_stages_per_rank=3)", num_ranks=8, num_layers=64)
    ('interleaved-1f1b(num_stages_per_rank=3)',)

    Args:
        name: A name, which is not varied if it has options.
        num_ranks: The ranks.
        num_layers: The layers of the model: no variant has more stages.
    """
    if name not in GENERATORS:
        return (name,)
    found: list[dict[str, Any]] = [{}]
    for option, values in _WORTH_A_TRY.items():
        if option in options_of(name):
            found = [{**options, option: value} for options in found for value in values]
    defaults, *others = found
    fitting = (each for each in others if each[_STAGES] * num_ranks <= num_layers)
    return tuple(_write_name(name, options) for options in (defaults, *fitting))


def require_options(name: str, options: Mapping[str, Any]) -> None:
    """Requires options that a schedule has.

    Raises:
        ValueError: naming the first that it lacks, and the schedules that have it.
    """
    for option, value in options.items():
        if option in options_of(name):
            continue
        having = [repr(each) for each in GENERATORS if option in options_of(each)]
        instead = f"take schedule {' or '.join(having)}, or " if having else ""
        found = ", ".join(options_of(name)) or "none"
        raise ValueError(
            f"{option}={brief(value)}: must be an option of schedule {name!r}, which has {found}; "
            f"{instead}leave it out"
        )


def base_name(name: str) -> str:
    """Leaves out the options of a name."""
    return name.partition("(")[0]


def short_name(name: str) -> str:
    """Leaves the names of options out of a name, for narrow tables.

    >>> short_name("interleaved-zb(num_stages_per_rank=4, num_deferred=2r)"), short_name("zb-h1")
    ('interleaved-zb(4,2r)', 'zb-h1')
    """
    return re.sub(r"\w+=| ", "", name)


def read_name(name: Any) -> tuple[str, dict[str, Any]] | None:
    """Reads the known name, and the options behind it; None of anything else."""
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None or found[1] not in GENERATORS:
        return None
    texts = dict(_OPTION.findall(found[2] or ""))
    known = ",".join(f"{option}={text}" for option, text in texts.items())
    if known.replace(" ", "") != (found[2] or "").replace(" ", ""):
        return None
    return found[1], {option: _read(text) for option, text in texts.items()}


def _read(text: str) -> Any:
    if text.startswith("("):
        return tuple(map(int, _INTEGER.findall(text)))
    return int(text) if _INTEGER.fullmatch(text) else text


def _write_name(name: str, options: Mapping[str, Any]) -> str:
    defaults = options_of(name)
    written = {option: _write(value) for option, value in options.items()}
    others = [f"{o}={text}" for o, text in written.items() if text != _write(defaults[o])]
    return f"{name}({', '.join(others)})" if others else name


def _write(value: Any) -> str:
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return str(value)
    return f"({', '.join(str(int(n)) for n in value)})"
