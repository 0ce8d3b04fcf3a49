"""Mappings that parameters may be, each a pytree in another way."""

from collections import OrderedDict

import flax
import jax
from jax.tree_util import GetAttrKey


class WithoutKeys(dict):
    """Its children have no names as a pytree."""


class Attributes(dict):
    """Its children are attributes to a pytree."""


jax.tree_util.register_pytree_node(
    WithoutKeys,
    lambda node: (tuple(node.values()), tuple(node)),
    lambda keys, children: WithoutKeys(zip(keys, children, strict=True)),
)
jax.tree_util.register_pytree_with_keys(
    Attributes,
    lambda node: (tuple((GetAttrKey(key), child) for key, child in node.items()), tuple(node)),
    lambda keys, children: Attributes(zip(keys, children, strict=True)),
)

MAPPINGS = (OrderedDict, flax.core.freeze, WithoutKeys, Attributes)
