"""Checks and counts the layers of each stage, without JAX."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

from dualpipe_jax._errors import brief, raise_all, show

# The layers of each stage in model order, the word for a split by costs, or None for an even one.
LayersPerStage = Sequence[int] | Literal["balanced"] | None
BALANCED: Final = "balanced"
# Layers are counted in integers of 64 bits.
MOST_LAYERS = 10**12


def stage_sizes(
    value: Any, *, num_stages: int, where: str
) -> tuple[int, ...] | Literal["balanced"] | None:
    """Requires a number of layers for each stage, `"balanced"`, or None.

    A stage without layers passes x on: the first one has the embedding alone, the last the head.

    >>> stage_sizes([3, 3, 0], num_stages=3, where="")
    (3, 3, 0)

    Args:
      value: The user's `layers_per_stage`.
      num_stages: The stages.
      where: Words of a message that follow "for each of the stages".

    Raises:
      ValueError: If there are too many or too few, one is negative, or all are zero.
      TypeError: If it is no sequence of integers.
    """
    if value is None:
        return None
    if isinstance(value, str) and value == BALANCED:
        return BALANCED
    must = f"must be a number of layers for each of the {num_stages} stages{where}, in model order"
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | dict | set):
        raise TypeError(
            f'layers_per_stage={brief(value)}: {must}, "balanced", or None; got {show(value)}'
        )
    try:
        given = list(value)
    except TypeError:  # an array of no dims
        given = [value]
    sizes = [_index(number) for number in given]
    raise_all(
        f"layers_per_stage={brief(value)}: {must}, all integers",
        (
            f"stage {stage} has {show(number)}"
            for stage, (number, size) in enumerate(zip(given, sizes, strict=True))
            if size is None
        ),
        error=TypeError,
    )
    if len(sizes) != num_stages:
        raise ValueError(
            f"layers_per_stage={brief(value)}: {must}, but has {len(sizes)} numbers; give as many "
            "as there are stages"
        )
    raise_all(
        f"layers_per_stage={brief(value)}: every stage must have at least 0 layers, and at most "
        f"{MOST_LAYERS:,}; change the number of each of these",
        (
            f"stage {stage} has {size}"
            for stage, size in enumerate(sizes)
            if not 0 <= size <= MOST_LAYERS
        ),
    )
    if not any(sizes):
        raise ValueError(
            f"layers_per_stage={brief(value)}: at least one stage must have a layer, but all have "
            "0; give the layers of the model to the stages"
        )
    return tuple(sizes)


def upper_layers(num_layers: Any) -> Any:
    """Counts the layers in the upper half of a full backward: the stage's last ones, run first.

    >>> upper_layers(4), upper_layers(5)
    (2, 3)
    """
    return (num_layers + 1) // 2


def is_lower(index: Any, num_layers: Any) -> Any:
    """Whether a layer is in the lower half of a full backward of a stage of so many layers.

    >>> [is_lower(index, 5) for index in range(6)]
    [True, True, False, False, False, False]
    """
    return index < num_layers - upper_layers(num_layers)


def is_upper(index: Any, num_layers: Any) -> Any:
    """Whether a layer is in the upper half.

    >>> [is_upper(index, 5) for index in range(6)]
    [False, False, True, True, True, False]
    """
    return (num_layers - upper_layers(num_layers) <= index) & (index < num_layers)


def spread_evenly(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Counts the layers of each stage; the first ones get one more if they do not divide.

    >>> spread_evenly(7, 4)
    (2, 2, 2, 1)
    """
    fewest, rest = divmod(num_layers, num_stages)
    return (fewest + 1,) * rest + (fewest,) * (num_stages - rest)


def require_layers(
    num_layers: int, *, num_stages: int, where: str, argument: str = "num_layers"
) -> None:
    """Requires a layer for every stage, and no more layers than integers count.

    Args:
      num_layers: The layers of the model.
      num_stages: The stages.
      where: Words of a message that follow "the stages".
      argument: The argument that says how many layers there are.

    Raises:
      ValueError: If there are fewer, or too many.
    """
    if not num_stages <= num_layers <= MOST_LAYERS:
        raise ValueError(
            f"{argument}={brief(num_layers)}: must be at least the {num_stages} stages{where}, and "
            f"at most {MOST_LAYERS:,}; for stages without layers name the layers of each stage: "
            "layers_per_stage"
        )


def require_sum(sizes: tuple[int, ...] | None, num_layers: int) -> None:
    """Requires the stages to have all layers of the model."""
    if sizes is not None and sum(sizes) != num_layers:
        raise ValueError(
            f"layers_per_stage={brief(sizes)}: must sum to the number of layers, "
            f"{brief(num_layers)}, but its sum is {sum(sizes)}; change it, or the depth of the "
            "model"
        )


def _index(value: Any) -> Any:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
