"""Every primitive that the passes treat specially exists in the installed JAX."""

import gc
from importlib import metadata

import jax
import jax.scipy.special  # some primitives are made when a module of JAX is imported
import pytest

from dualpipe_jax._split_vjp import primitives

SETS = {name: value for name, value in vars(primitives).items() if isinstance(value, frozenset)}
# Named one by one, where a pass treats one primitive alone.
SINGLE = frozenset(
    """
    add_any cond convert_element_type dot_general new_ref optimization_barrier scan shard_map slice
    transpose unstack
    """.split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def existing() -> set[str]:
    """The names of all primitives of the installed JAX; `jax.extend` lists only some of them."""
    found = (o for o in gc.get_objects() if isinstance(o, jax.extend.core.Primitive))
    return {primitive.name for primitive in found}


@pytest.mark.parametrize("names", [*SETS.values(), SINGLE], ids=[*SETS, "single"])
def test_primitives_exist(names: frozenset[str], existing: set[str]) -> None:
    missing = names - existing
    is_old = tuple(map(int, metadata.version("jax").split(".")[:2])) < (0, 12)
    assert missing <= (primitives.NEWER if is_old else set())


def test_newer_primitives_are_missing_in_the_oldest_release(existing: set[str]) -> None:
    if metadata.version("jax").startswith("0.10."):
        assert not primitives.NEWER & existing
