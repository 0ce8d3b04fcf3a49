"""Layers come to the ranks that run them, and gradients back, by permutes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe_jax._executor.bring import Stack, spread
from dualpipe_jax._executor.travel import plan_travel
from dualpipe_jax._leaves.rules import LARGEST, SUM

PLACEMENTS = {
    "one stage a rank": [[0, 1, 2, 3]],
    "both directions": [[0, 1, 2, 3], [3, 2, 1, 0]],
    "both directions of odd P": [[0, 1, 2], [2, 1, 0]],
    "there and back": [[0, 1, 2, 3], [7, 6, 5, 4]],
    "round and round": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
    "a rank with less": [[0, 1, 2], [3, -1, -1]],
    "all on one": [[0, -1], [1, -1], [2, -1], [3, -1]],
}


@st.composite
def placements(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Any placement of stages on ranks, some twice, some ranks with fewer; layers of any number.

    A stage may have none of a kind's layers.
    """
    num_ranks = draw(st.integers(1, 5))
    num_stages = draw(st.integers(1, 8))
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    for stage in range(num_stages):
        for rank in draw(st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=2)):
            held[rank].append(stage)
    num_chunks = max(map(len, held))
    table = [row + [-1] * (num_chunks - len(row)) for row in held]
    if draw(st.booleans()):
        least = -(-num_stages // num_ranks)
        num_layers = num_ranks * draw(st.integers(least, least + 3))
        return np.array(table).T, spread(num_layers, num_stages)
    counts = draw(st.lists(st.integers(0, 4), min_size=num_stages, max_size=num_stages))
    stage = draw(st.integers(0, num_stages - 1))
    counts[stage] += -sum(counts) % num_ranks or (0 if any(counts) else num_ranks)
    return np.array(table).T, np.cumsum([0, *counts])


@given(placements())
def test_every_layer_arrives_in_as_few_rounds_as_can_be(
    drawn: tuple[np.ndarray, np.ndarray],
) -> None:
    stage_of, firsts = drawn
    num_chunks, num_ranks = stage_of.shape
    shard = int(firsts[-1]) // num_ranks
    rounds = plan_travel(stage_of=stage_of, first_layers=firsts, shard_layers=shard)
    per_chunk = int(np.diff(firsts).max())
    got = np.full((num_ranks, num_chunks * per_chunk), -1)
    layers_of = np.zeros((2, num_ranks), int)
    for way in rounds:
        targets = [target for _, target in way.pairs]
        assert len(set(targets)) == len(targets)
        for source, target in way.pairs:
            layers_of[0, source] += way.count
            layers_of[1, target] += way.count
            start = source * shard + way.first[source]
            place = way.entry[target]
            assert way.first[source] + way.count <= shard
            assert place // per_chunk == (place + way.count - 1) // per_chunk
            assert (got[target, place : place + way.count] == -1).all()
            got[target, place : place + way.count] = range(start, start + way.count)
    assert sum(way.count for way in rounds) == layers_of.max()
    # Deeper models have larger pieces, not more of them.
    deeper = plan_travel(stage_of=stage_of, first_layers=7 * firsts, shard_layers=7 * shard)
    assert len(deeper) == len(rounds)
    for (chunk, rank), stage in np.ndenumerate(stage_of):
        layers = list(range(*firsts[stage : stage + 2])) if stage >= 0 else []
        mine = got[rank, chunk * per_chunk : (chunk + 1) * per_chunk]
        assert mine.tolist() == layers + [-1] * (len(mine) - len(layers))


@pytest.mark.parametrize("layers_a_rank", [1, 2, 3, 4])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_fetch_and_collect(name: str, layers_a_rank: int) -> None:
    stage_of = np.array(PLACEMENTS[name])
    num_ranks, num_stages = stage_of.shape[1], int(stage_of.max()) + 1
    num_layers = max(num_ranks * layers_a_rank, -(-num_stages // num_ranks) * num_ranks)
    firsts = spread(num_layers, num_stages)
    stack = Stack(axis="pipe", first_layers=firsts, stage_of=stage_of)
    assert stack.is_sharded
    mesh = jax.make_mesh(
        (num_ranks,),
        ("pipe",),
        devices=jax.devices()[:num_ranks],
        axis_types=(jax.sharding.AxisType.Auto,),
    )

    def run(blocks: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        chunks = stack.fetch(blocks)
        # Entries of a chunk that its stage does not fill never get a gradient.
        mine = jnp.asarray(np.where(stage_of < 0, 0, np.diff(firsts)[stage_of]))
        counts = mine[:, jax.lax.axis_index("pipe")]
        inside = [jnp.arange(stack.max_layers) < count for count in counts]
        grads = [
            # Beside gradients to be added up, values below zero of which the largest counts.
            [
                jnp.where(m[:, None], value, rule.nothing)
                for value, rule in ((c, SUM), (-c, LARGEST))
            ]
            for m, c in zip(inside, chunks, strict=True)
        ]
        return [chunk[None] for chunk in chunks], stack.collect(grads, [SUM, LARGEST])

    program = jax.jit(
        jax.shard_map(
            run, mesh=mesh, in_specs=jax.P("pipe"), out_specs=jax.P("pipe"), check_vma=False
        )
    )
    blocks = np.stack([np.arange(1.0, num_layers + 1), np.arange(num_layers) ** 2], axis=1)
    chunks, (total, largest) = program(blocks)
    copies = np.zeros(num_layers)
    for (chunk, rank), stage in np.ndenumerate(stage_of):
        if stage < 0:
            continue
        layers = slice(*firsts[stage : stage + 2])
        want = blocks[layers]
        np.testing.assert_array_equal(chunks[chunk][rank, : len(want)], want)
        copies[layers] += 1
    np.testing.assert_array_equal(total, blocks * copies[:, None])
    np.testing.assert_array_equal(largest, -blocks)
    text = program.lower(blocks).compile().as_text()
    assert text is not None
    assert "all-gather" not in text
    assert "all-reduce" not in text
