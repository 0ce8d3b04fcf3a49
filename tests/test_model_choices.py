"""`choose`: shapes -> schedules in order, with the memory that the step itself reports."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import dualpipe_jax as dpj
from dualpipe_jax._costs import parse_bytes
from dualpipe_jax._schedule.named import base_name
from tests.models import (
    assert_close,
    make_batch,
    make_mesh,
    make_model,
    make_params,
    sequential_value_and_grad,
)
from tests.schedules_under_test import NAMES

WHERE: dict[str, Any] = {"mesh": AbstractMesh((4,), ("pipe",)), "num_microbatches": 8}
ROWS, WIDTH = 16, 32


def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


MODEL = dpj.Model(
    embed=lambda ends, ctx: ctx.microbatch,
    block=block,
    head=lambda ends, x, ctx: jnp.square(x @ ends).mean(),
)


def shapes_of(num_layers: int = 8, *, width: int = WIDTH, rows: int = ROWS) -> tuple[Any, Any]:
    sizes = {"up": (num_layers, width, 4 * width), "down": (num_layers, 4 * width, width)}
    blocks = {name: jax.ShapeDtypeStruct(size, np.float32) for name, size in sizes.items()}
    ends = jax.ShapeDtypeStruct((width, 64), np.float32)
    batch = jax.ShapeDtypeStruct((8 * rows, width), np.float32)
    return {"ends": ends, "blocks": blocks}, batch


@pytest.fixture(scope="module")
def choices() -> Any:
    return dpj.choose(MODEL, *shapes_of(), **WHERE, memory="1GiB", optimizer=optax.adam(1e-3))


def test_every_schedule_with_remat_and_without_in_order(choices: Any) -> None:
    assert {base_name(choice.schedule) for choice in choices} == set(NAMES)
    assert {choice.remat for choice in choices} == {"none", "block"}
    makespans = [choice.simulation.makespan for choice in choices]
    np.testing.assert_allclose(makespans, sorted(makespans), rtol=1e-9)
    assert all(choice.fits for choice in choices)


def test_costs_are_the_models_own(choices: Any) -> None:
    """Two matmuls of a layer, in each of F, I and W; I runs the first one again under remat."""

    def moved(rows: int, width_in: int, width_out: int) -> int:  # which takes longer than its FLOPs
        return rows * width_in + width_in * width_out + rows * width_out

    head = moved(ROWS, WIDTH, 64) / (4 * moved(ROWS, WIDTH, 4 * WIDTH))  # two layers of a rank
    for choice in choices:
        assert (choice.costs.forward, choice.costs.weight_grad) == (1, 1)
        assert choice.costs.input_grad == (1.5 if choice.remat == "block" else 1)
        # With its gradient, counted at the cost of the layers' gradient.
        assert choice.costs.head * (1 + choice.costs.backward) == pytest.approx(3 * head)
        # x and, if it is not recomputed, the tanh; the cotangents of both.
        x = 2 * ROWS * WIDTH * 4
        kept = x if choice.remat == "block" else x + 4 * x
        assert (choice.costs.activation_bytes, choice.costs.stash_bytes) == (kept, kept)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_search_by_bytes_fits_by_the_report_of_its_step(choices: Any, remat: str) -> None:
    costs = next(choice.costs for choice in choices if choice.remat == remat)
    memory = 3 * costs.activation_bytes + costs.stash_bytes
    sizes: dict[str, Any] = {"num_ranks": 4, "num_microbatches": 8, "placement": "v"}
    found = dpj.schedules.search(**sizes, costs=costs, transfer=0.1, memory=memory, moves=50)
    execution = dpj.Execution(split_backward=True)
    grad_fn = dpj.value_and_grad(
        MODEL, **WHERE, schedule=found, remat=remat, costs=costs, execution=execution
    )
    report = grad_fn.memory(*shapes_of())
    stashes = "stashes for W" if remat == "none" else "inputs of deferred W that recompute"
    names = ("residuals for I", "residuals for I and W", stashes)
    assert 0.8 * memory < sum(t.num_bytes for t in report.terms if t.name in names) <= memory


def test_memory_is_that_of_the_steps_report_and_its_arguments(choices: Any) -> None:
    params, batch = shapes_of()
    of_params = 2 * 2 * 4 * WIDTH**2 * 4 + WIDTH * 64 * 4  # two layers of eight, and all of ends
    for choice in (choices[0], choices[-1]):
        grad_fn = dpj.value_and_grad(MODEL, **WHERE, **choice.arguments)
        report = grad_fn.memory(params, batch)
        terms = {term.name: term.num_bytes for term in choice.terms}
        assert terms.pop("parameters") == of_params
        assert terms.pop("optimizer") == 2 * of_params + 4  # and a count
        assert terms.pop("batch") == 8 * ROWS * WIDTH * 4
        assert terms == {term.name: term.num_bytes for term in report.fullest}
        expected = dict(vars(report.execution), unroll=None)
        assert vars(choice.execution) == expected


def simulated(choice: Any, *, num_layers: int) -> dpj.Simulation:
    """Simulates a choice's step by itself."""
    schedule = dpj.schedules.make(choice.schedule, num_ranks=4, num_microbatches=8)
    return dpj.simulate(
        schedule,
        costs=choice.costs,
        transfer=0.1,
        num_layers=num_layers,
        layers_per_stage=choice.layers_per_stage,
        execution=choice.execution,
    )


def test_the_step_is_the_one_that_is_simulated(choices: Any) -> None:
    for choice in choices[::5]:
        assert simulated(choice, num_layers=8) == choice.simulation


def test_a_limit_divides_and_a_text_is_printed(choices: Any) -> None:
    least, most = (f(c.num_bytes for c in choices) for f in (min, max))
    some = dpj.choose(
        MODEL, *shapes_of(), **WHERE, memory=(least + most) / 2, optimizer=optax.adam(1e-3)
    )
    fits = [choice.fits for choice in some]
    assert 0 < sum(fits) < len(fits)
    assert fits == sorted(fits, reverse=True)
    text = str(some)
    assert "too large: most of it is" in text
    assert some.left_out == {}
    lines = text.splitlines()
    assert len(lines[0].split()) > 5
    # The last line can be pasted.
    eval(lines[-1], {"dpj": dpj, "model": MODEL, "mesh": WHERE["mesh"]})


def test_the_table_tells_numbers_of_microbatches_apart() -> None:
    where: dict[str, Any] = {**WHERE, "num_microbatches": (8, 16)}
    some = dpj.choose(MODEL, *shapes_of(), **where, schedules="1f1b", remat="none")
    heading, *rows = str(some).splitlines()[: len(some) + 1]
    column = heading.split().index("microbatches")
    numbers = [row.split()[column + 1] for row in rows]  # behind the place
    assert numbers == [str(choice.simulation.num_microbatches) for choice in some]
    assert set(numbers) == {"8", "16"}
    eval(str(some).splitlines()[-1], {"dpj": dpj, "model": MODEL, "mesh": WHERE["mesh"]})
    with pytest.raises(ValueError, match=r"num_microbatches=\(8, 8\): must name each number once"):
        dpj.choose(MODEL, *shapes_of(), **(where | {"num_microbatches": (8, 8)}))


@pytest.mark.slow
def test_its_arguments_make_an_exact_step() -> None:
    model, params, batch = make_model(frozenset(["pytree"])), make_params(5), make_batch(4)
    where = {"mesh": make_mesh(2), "num_microbatches": 4}
    zb_h1 = dpj.schedules.zb_h1(num_ranks=2, num_microbatches=4)
    names = ["1f1b", zb_h1]
    best, *others = dpj.choose(model, params, batch, **where, schedules=names, remat="block")
    assert {choice.schedule for choice in (best, *others)} == {"1f1b", "zb-h1"}
    for one in ("1f1b", zb_h1):
        found = dpj.choose(model, params, batch, **where, schedules=one, remat="block")
        assert len({choice.schedule for choice in found}) == 1
    own = dpj.Schedule.from_csv(zb_h1.to_csv(), name="mine")
    (choice, *_) = dpj.choose(
        model, params, batch, **where, schedules=[own], layers_per_stage=(2, 3), remat="none"
    )
    assert choice.arguments["schedule"] is own
    assert choice.arguments["layers_per_stage"] == (2, 3)
    got = jax.jit(dpj.value_and_grad(model, **where, **best.arguments))(params, batch)
    assert_close(got, sequential_value_and_grad(model, 4)(params, batch))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"memory": "lots"}, ValueError, "memory='lots': .*is not a size"),
        ({"headroom": 1.5}, ValueError, "headroom=1.5: must be a share"),
        ({"host_memory": -1}, ValueError, "host_memory=-1: .*is not a size"),
        ({"host_memory": "9KiB"}, ValueError, "host_memory='9KiB': must be at least 1 MiB"),
        ({"host_memory": "9GiB"}, ValueError, "host_link=None: must be the bytes a second"),
        ({"host_link": "32GB/s"}, TypeError, "host_link='32GB/s': must be bytes a second"),
        ({"costs": dpj.Costs()}, ValueError, "costs: must come with the one remat"),
        ({"schedules": ["1F1B"]}, ValueError, "schedules: must be some of .*'1f1b'.*'1F1B'"),
        ({"remat": "full"}, ValueError, "remat='full'"),
        ({"num_microbatches": 5}, ValueError, "batch"),
        ({"num_microbatches": {8}}, TypeError, r"num_microbatches=\{8\}: must be a sequence"),
        ({"schedules": []}, ValueError, "schedules="),
        ({"schedules": 3}, TypeError, "schedules=3: must be a sequence of names and Schedules"),
        ({"schedules": ["1f1b", 3]}, TypeError, "schedules: must be names.*int 3"),
        ({"headroom": "x"}, TypeError, "headroom='x': must be a number"),
        ({"remat": 3}, TypeError, "remat=3: must be a sequence of"),
        ({"remat": "none", "costs": {}}, TypeError, "costs={}: must be a dualpipe_jax.Costs"),
        ({"optimizer": 3}, TypeError, "optimizer=3: must be an optax transformation"),
    ],
)
def test_mistakes_are_explained(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        dpj.choose(MODEL, *shapes_of(), **{**WHERE, **change})


def test_sizes_are_read() -> None:
    assert parse_bytes("1.5KiB") == 1536
    assert dpj.choose(MODEL, *shapes_of(), **WHERE, schedules=["1f1b"])[0].limit == math.inf


def test_schedules_that_cannot_run_are_left_out_and_named() -> None:
    made = dpj.choose(MODEL, *shapes_of(5), **WHERE, remat="none")
    two_a_rank = {
        name
        for name in NAMES
        if dpj.schedules.make(name, num_ranks=4, num_microbatches=8).num_stages == 8
    }
    assert {choice.schedule for choice in made} == set(NAMES) - two_a_rank
    assert set(made.left_out) == two_a_rank
    assert all("5 layers" in reason for reason in made.left_out.values())
    assert "left out: dualpipev: " in str(made)


# ---- slots in the host's memory

# Values of 2 and 8 MiB, in four layers a stage.
LARGE = shapes_of(16, width=512, rows=1024)
HOST: dict[str, Any] = {"host_memory": "1GiB", "host_link": 32e9}


@cache
def choose_large(memory: str = "300MiB", **options: Any) -> Any:
    given: dict[str, Any] = {"schedules": ("1f1b", "zb-h1"), "remat": "none", **options}
    return dpj.choose(MODEL, *LARGE, **WHERE, memory=memory, **given)


def plain(choices: Any) -> list[Any]:
    """Gives the choices without slots on the host, as they would be without its memory."""
    costs = choose_large()[0].costs
    return [
        replace(choice, costs=costs, host_memory=0.0)
        for choice in choices
        if choice.execution.slots_on_device is None
    ]


def best(choices: Any) -> float:
    return choices[0].simulation.makespan if choices[0].fits else math.inf


def test_slots_on_the_host_make_a_step_fit_whose_report_and_replay_are_those_said() -> None:
    made = choose_large(**HOST)
    assert plain(made) == list(choose_large())
    assert not any(choice.fits for choice in plain(made))
    on_host = [choice for choice in made if choice.without_host is not None]
    assert on_host == [choice for choice in made if choice.fits]
    for choice in on_host:
        grad_fn = dpj.value_and_grad(MODEL, **WHERE, **choice.arguments)
        report = grad_fn.memory(*LARGE)
        assert report.host_bytes == choice.host_bytes > 0
        inside = {term.name: term.num_bytes for term in report.fullest}
        assert inside.items() <= {term.name: term.num_bytes for term in choice.terms}.items()
        again = simulated(choice, num_layers=16)
        assert again == choice.simulation
        assert again.copied > 0
        fewer = choice.without_host.num_bytes - choice.num_bytes
        slots = f"{choice.execution.slots_on_device} of {again.peak_weight_activations} slots"
        assert choice.why.startswith(f"{slots} on the device: {fewer / 2**20:.3g} MiB fewer there")
        # With more slots on the device the step is the same, or does not fit.
        for number in range(choice.execution.slots_on_device + 1, again.peak_weight_activations):
            execution = replace(choice.execution, slots_on_device=number)
            more = dpj.value_and_grad(
                MODEL, **WHERE, **{**choice.arguments, "execution": execution}
            ).memory(*LARGE)
            is_same = more.host_bytes == report.host_bytes
            assert is_same or choice.num_bytes - report.num_bytes + more.num_bytes > 270 * 2**20


def test_copies_take_an_activations_bytes_over_the_link() -> None:
    (costs, *_) = (choice.costs for choice in choose_large(**HOST))
    assert costs.activation_bytes == 4 * (2 + 8) * 2**20
    # Two matmuls a layer, whose operands move for longer than they are multiplied.
    moved = 4 * 2 * 4 * (1024 * 512 + 512 * 2048 + 1024 * 2048)
    forward = 240 * moved / 197e12
    assert costs.spill == costs.fill == pytest.approx(costs.activation_bytes / 32e9 / forward)
    # Costs of the caller's, in another unit, and with copies of their own.
    doubled = choose_large(costs=dpj.Costs(forward=2), **HOST)
    assert doubled[0].costs == dpj.Costs(forward=2, spill=2 * costs.spill, fill=2 * costs.fill)
    own = dpj.Costs(spill=3)
    assert choose_large(costs=own, host_memory="1GiB")[0].costs == own
    # The devices' own link and peak.
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = AbstractMesh((4,), ("pipe",), abstract_device=device)
    where: dict[str, Any] = {**WHERE, "mesh": mesh, "schedules": "1f1b", "remat": "none"}
    of_h100 = dpj.choose(MODEL, *LARGE, **where, host_memory="1GiB")[0].costs
    assert of_h100.spill == pytest.approx(costs.spill * (989 / 197) / 2)


def test_a_faster_link_and_more_memory_of_the_host_are_never_slower() -> None:
    links = [best(choose_large(**{**HOST, "host_link": link})) for link in (4e9, 32e9, 1e15)]
    assert links == sorted(links, reverse=True)
    assert links[0] > links[-1]
    memories = ("1MiB", "40MiB", "130MiB", "1GiB")
    times = [best(choose_large(**{**HOST, "host_memory": memory})) for memory in memories]
    assert times == sorted(times, reverse=True)
    assert math.inf in times
    assert times[-1] < math.inf
    for memory in memories:
        made = choose_large(**{**HOST, "host_memory": memory})
        assert all(choice.host_bytes <= choice.host_memory for choice in made)
    # Copies over the fastest link take no time: the step is that of a device with more memory.
    by_link = choose_large(**{**HOST, "host_link": 1e15})[0]
    assert best([by_link]) == pytest.approx(by_link.without_host.simulation.makespan)


def test_nothing_waits_on_the_host_where_all_fits_or_its_memory_is_not_given() -> None:
    assert plain(choose_large("1GiB", **HOST)) == list(choose_large("1GiB"))
    assert len(choose_large("1GiB", **HOST)) == len(choose_large("1GiB"))
    text = str(choose_large())
    assert str(choose_large(host_memory=0, host_link=1.0)) == text
    assert "host" not in text
    heading, *_ = str(choose_large(**HOST)).splitlines()
    assert heading.split()[-4:] == ["memory", "host", "execution", "why"]
