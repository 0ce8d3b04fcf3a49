"""A slow, plain executor of `Tables` in NumPy, and the model it runs: sin(weight @ x) a stage.

The model needs every buffer: I reads a value of its own (the residual, weight @ x), W needs x (the
weight residual) and the cotangent of weight @ x, which I computes for it (the stash). In a full
backward the upper half is the sin's, the lower one the product's. A slot that holds nothing
holds NaN, which would spread to loss or gradient. Exchanges bring to each rank the values of their
pairs, and NaN in place of others.
"""

import numpy as np

from dualpipe_jax._schedule.actions import FORWARD, Opcode
from dualpipe_jax._schedule.tables import Tables

WIDTH = 2
INPUT_GRADS = (
    Opcode.INPUT_GRAD,
    Opcode.INPUT_GRAD_DEFERRING,
    Opcode.BACKWARD_UPPER,
    Opcode.BACKWARD,
)


def random_model(num_stages: int, num_microbatches: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes weights [num_stages, WIDTH, WIDTH] and inputs [num_microbatches, WIDTH]."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(num_stages, WIDTH, WIDTH)), rng.normal(size=(num_microbatches, WIDTH))


def loss_and_grads(weights: np.ndarray, inputs: np.ndarray) -> tuple[float, np.ndarray]:
    """Computes the summed loss, |x|^2 / 2 after the last stage, and its gradients, directly."""
    saved, x = [], inputs
    for weight in weights:
        saved.append((x, x @ weight.T))
        x = np.sin(x @ weight.T)
    cotangent, grads = x, np.zeros_like(weights)
    for stage in reversed(range(len(weights))):
        stage_x, product = saved[stage]
        product_cotangent = cotangent * np.cos(product)
        grads[stage] = product_cotangent.T @ stage_x
        cotangent = product_cotangent @ weights[stage]
    return float((x * x).sum() / 2), grads


def assert_computes_loss_and_grads(tables: Tables) -> None:
    """Runs tables with gradients on a random model."""
    model = random_model(tables.num_stages, tables.num_microbatches)
    loss, grads = run(tables, *model)
    expected_loss, expected_grads = loss_and_grads(*model)
    # The order of summation differs; float64 keeps 1e-12 with room to spare.
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    np.testing.assert_allclose(grads, expected_grads, rtol=1e-12, atol=1e-12)


def run(tables: Tables, weights: np.ndarray, inputs: np.ndarray) -> tuple[float, np.ndarray]:
    """Computes the same by executing the tables; gradients are zero if they are forward-only."""
    num_ranks, last = tables.num_ranks, tables.num_stages - 1
    buffers = {
        name: np.full((num_ranks, num_slots, WIDTH), np.nan)
        for name, num_slots in tables.num_slots.items()
    }
    loss, grads = 0.0, np.zeros((tables.num_chunks, *weights[tables.stage_of[0]].shape))
    # By the sender's side: the values from the left neighbour, and from the right one.
    arrived = {side: np.full((num_ranks, WIDTH), np.nan) for side in ("from_left", "from_right")}

    def take(name: str, rank: int, slot: int, *, last_read: bool = True) -> np.ndarray:
        value = buffers[name][rank, slot].copy()
        assert np.isfinite(value).all(), (name, rank, slot)
        if last_read:
            buffers[name][rank, slot] = np.nan
        return value

    def put(name: str, rank: int, slot: int, value: np.ndarray) -> None:
        assert np.isnan(buffers[name][rank, slot]).all(), (name, rank, slot)
        buffers[name][rank, slot] = value

    def put_arrivals(row: dict[str, np.ndarray]) -> None:
        for column, values in arrived.items():
            for rank in np.flatnonzero(row[column] >= 0).tolist():
                put("received", rank, int(row[column][rank]), values[rank])

    for tick in range(tables.num_ticks):
        row = {column: getattr(tables, column)[tick] for column in Tables.columns()}
        output = np.full((num_ranks, WIDTH), np.nan)
        if not tables.is_lazy:
            put_arrivals(row)
        for rank in range(num_ranks):
            cell = {column: int(values[rank]) for column, values in row.items()}
            opcode, stage, microbatch = cell["opcode"], cell["stage"], cell["microbatch"]
            weight = weights[tables.stage_of[cell["chunk"], rank]]
            if opcode == FORWARD:
                x = take("received", rank, cell["read"]) if stage else inputs[microbatch]
                product = weight @ x
                if not tables.forward_only:
                    put("residual", rank, cell["residual"], product)
                    put("weight_residual", rank, cell["weight_residual"], x)
                output[rank] = np.sin(product)
                if stage == last:  # the head: its loss's cotangent is x itself
                    loss += output[rank] @ output[rank] / 2
            elif opcode in INPUT_GRADS:
                cotangent = take("received", rank, cell["read"])
                is_upper = opcode == Opcode.BACKWARD_UPPER
                product = take("residual", rank, cell["residual"], last_read=not is_upper)
                x = take("weight_residual", rank, cell["weight_residual"], last_read=False)
                of_product = cotangent * np.cos(product)
                output[rank] = of_product if is_upper else weight.T @ of_product
                if opcode == Opcode.INPUT_GRAD:
                    put("stash", rank, cell["stash"], of_product)
                elif opcode == Opcode.INPUT_GRAD_DEFERRING:
                    put("deferred", rank, cell["deferred"], cotangent)
                elif opcode == Opcode.BACKWARD:
                    grads[cell["chunk"], rank] += np.outer(of_product, x)
            elif opcode != Opcode.IDLE:
                x = take("weight_residual", rank, cell["weight_residual"])
                of_product = np.zeros(WIDTH)
                if opcode == Opcode.WEIGHT_GRAD:
                    of_product = take("stash", rank, cell["stash"])
                elif opcode == Opcode.WEIGHT_GRAD_DEFERRED:  # it makes the stash again
                    of_product = take("deferred", rank, cell["deferred"]) * np.cos(weight @ x)
                elif opcode == Opcode.BACKWARD_LOWER:
                    take("residual", rank, cell["residual"])
                    of_product = take("received", rank, cell["read"])
                    output[rank] = weight.T @ of_product
                grads[cell["chunk"], rank] += np.outer(of_product, x)
            if cell["keep"] >= 0:
                put("received", rank, cell["keep"], output[rank])
            if cell["send"] >= 0:
                output[rank] = take("received", rank, cell["send"])
        if tables.is_lazy:
            put_arrivals(row)
        arrived = _exchange(tables, tick, output)

    assert all(np.isnan(buffer).all() for buffer in buffers.values())
    total = np.zeros_like(weights)
    held = tables.stage_of >= 0
    np.add.at(total, tables.stage_of[held], grads[held])
    return loss, total


def _exchange(tables: Tables, tick: int, output: np.ndarray) -> dict[str, np.ndarray]:
    """Hands on the values of a tick's pairs, from rank to rank."""
    to_right, to_left = _pairs_of(tables, tick)
    arrived = {side: np.full_like(output, np.nan) for side in ("from_left", "from_right")}
    for side, pairs in (("from_left", to_right), ("from_right", to_left)):
        for source, target in pairs:
            assert np.isnan(arrived[side][target]).all(), "a rank is a target twice"
            arrived[side][target] = output[source]
    return arrived


def _pairs_of(tables: Tables, tick: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Lists who sends to whom to the right, and to the left, in a tick."""
    if tables.is_lazy:
        right, left = tables.neighbours
        return list(right), list(left)
    steady = tables.steady
    if steady is None or not steady.ticks.start <= tick < steady.ticks.stop:
        exchanges = [
            of_part[number]
            for of_part, number in zip(tables.exchanges, tables.exchange[tick], strict=True)
            if number
        ]
        right, left = ([pair for each in exchanges for pair in each[side]] for side in (0, 1))
        return right, left
    beat, phase = divmod(tick - steady.first_tick, 3)
    if phase == 2:  # nothing follows a W
        return [], []
    pairs = (steady.x_pairs, steady.cotangent_pairs)[phase][beat % steady.period]
    # A value that a rank sends itself is kept, by the tables.
    # Two ranks alone do not wrap: rank 1 sends to the left.
    ends = (tables.num_ranks - 1, 0) if tables.num_ranks > 2 else None
    right = [pair for pair in pairs if pair[1] == pair[0] + 1 or pair == ends]
    left = [pair for pair in pairs if pair[1] == pair[0] - 1 or pair[::-1] == ends]
    return right, left
