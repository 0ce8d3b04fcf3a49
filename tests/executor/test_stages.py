"""The loop over a stage's layers: each layer once, in model order, whatever the kinds."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpipe_jax._executor.buffers import write
from dualpipe_jax._executor.stages import Layer, Stages

# A letter is a layer, its name its kind.
LAYOUTS = {
    "one kind, unrolled": ("aaaaaa", 3),
    "one kind, uneven": ("aaaaaaa", 3),
    "one kind, many layers": ("a" * 10, 2),
    "alike in every stage": ("abbabbabb", 3),
    "alike in every stage, many layers": ("abbabb" * 2, 2),
    "one kind before the other": ("aabbbbb", 3),
    "a kind in one stage only": ("abbbcbb", 4),
    "uneven and mixed": ("abcbacbbacaab", 4),
}


def make_layout(name: str) -> Stages:
    letters, num_stages = LAYOUTS[name]
    stage_of = np.arange(num_stages)[None]
    return Stages(axis="pipe", kinds=tuple(letters), num_stages=num_stages, stage_of=stage_of)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layer_runs_once_in_order(name: str, reverse: bool) -> None:
    layout = make_layout(name)
    kinds, num_stages = layout.kinds, layout.num_stages
    numbers = {kind: number for number, kind in enumerate(layout.stacks)}

    def body(layer: Layer, carry: Any, mine: Any) -> Any:
        seen, count = carry
        entry = jnp.array([numbers[layer.kind], layer.index, layer.entry, layer.position])
        # Only buffers of the layer's own kind are passed.
        own = tuple(each.at[layer.index].add(layer.position + 1) for each in mine)
        ran = (write(seen, entry, count), count + 1), own
        return jax.tree.map(partial(jnp.where, layer.is_there), ran, (carry, mine))

    @jax.jit
    def run(stage: jax.Array, is_on: jax.Array) -> Any:
        carry = jnp.full((len(kinds), 4), -1), jnp.int32(0)
        buffers = ({kind: jnp.zeros(s.max_layers, int) for kind, s in layout.stacks.items()},)
        return layout.loop(stage, is_on, body, carry, buffers, reverse=reverse)

    position = 0
    for stage in range(num_stages):
        (seen, count), (buffers,) = run(jnp.int32(stage), jnp.bool_(True))
        mine = kinds[position:][: int(count)]
        want = []
        for i, kind in enumerate(mine):
            stack = layout.stacks[kind]
            place = kinds[: position + i].count(kind)  # in the stack
            offset = 0 if layout.is_unrolled else int(stack.offset_of(stage))
            slab = place - int(stack.first_layers[stage]) + offset
            want.append([numbers[kind], mine[:i].count(kind), slab, position + i])
            assert slab < stack.max_layers
        np.testing.assert_array_equal(seen[:count], want[::-1] if reverse else want)
        for kind, buffer in buffers.items():
            entries = [position + i + 1 for i, k in enumerate(mine) if k == kind]
            np.testing.assert_array_equal(buffer, entries + [0] * (len(buffer) - len(entries)))
        position += int(count)
    assert position == len(kinds)
    (_, count), (buffers,) = run(jnp.int32(0), jnp.bool_(False))
    assert count == 0
    assert not any(np.asarray(buffer).any() for buffer in buffers.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_hold_the_layers_that_stages_need(name: str) -> None:
    """No more of a kind than the stage that has the most of it; sharded where it divides."""
    layout = make_layout(name)
    kinds, num_stages = layout.kinds, layout.num_stages
    stages = [
        kinds[part[0] : part[-1] + 1] for part in np.array_split(range(len(kinds)), num_stages)
    ]
    for kind, stack in layout.stacks.items():
        assert stack.max_layers == max(stage.count(kind) for stage in stages)
        assert stack.num_layers == kinds.count(kind)
        divides = kinds.count(kind) % num_stages == 0
        assert layout.specs[kind] == (jax.P("pipe") if divides else jax.P())
