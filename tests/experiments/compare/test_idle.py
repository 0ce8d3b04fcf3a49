"""The comparison of idle time, small: its counts, and that its committed figures are reproduced."""

import functools
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import pytest
from jax.extend.core import Jaxpr, jaxprs_in_params

import dualpipe_jax as dpj
from experiments import tables
from experiments.compare import costs, idle
from experiments.compare.idle import Row, main, replay
from tests.commands import run_script

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "experiments" / "compare"
PAGE = FOLDER / "README.md"
SIZES = costs.Sizes(layers=64, width=4096, context=4096, heads=32, vocabulary=32_000)
SMALL = "--ranks 2 --ranks 4 --microbatches 2 --layers 8 --width 16 --context 8 --heads 2"


def test_flops_are_those_of_the_matmuls_in_the_jaxprs() -> None:
    """The FLOPs of y, of dx beside it, and of the parameters' gradients beside both."""
    sizes = costs.Sizes(layers=2, width=16, context=24, heads=4, vocabulary=40)
    aval = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    width, x = sizes.width, aval((1, sizes.context, sizes.width))

    def norm(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def block(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        heads = (*x.shape[:-1], sizes.heads, width // sizes.heads)
        q, k, v = ((norm(x) @ params[name]).reshape(heads) for name in "qkv")
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(x.shape) @ params["o"]
        return x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]

    def parts(function: Any, params: Any) -> tuple[int, int, int]:
        def with_dx(params: Any, x: Any, dy: Any) -> Any:
            y, pull = jax.vjp(lambda x: function(params, x), x)
            return y, pull(dy)

        def with_both(params: Any, x: Any, dy: Any) -> Any:
            y, pull = jax.vjp(function, params, x)
            return y, pull(dy)

        dy = jax.eval_shape(function, params, x)
        forward = matmul_flops(jax.make_jaxpr(function)(params, x).jaxpr)
        and_dx, and_both = (
            matmul_flops(jax.make_jaxpr(f)(params, x, dy).jaxpr) for f in (with_dx, with_both)
        )
        return forward, and_dx - forward, and_both - and_dx

    params = {name: aval((width, width)) for name in "qkvo"}
    params |= {"up": aval((width, 4 * width)), "down": aval((4 * width, width))}
    flops = costs.count(sizes)
    counted = flops.forward, flops.input_grad, flops.weight_grad
    assert parts(block, params) == counted
    forward, *backward = parts(lambda head, x: x @ head, aval((width, sizes.vocabulary)))
    assert (forward, sum(backward)) == (flops.head_forward, flops.head_backward)


def matmul_flops(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            avals: list[Any] = [v.aval for v in (equation.invars[0], equation.outvars[0])]
            left, product = (aval.shape for aval in avals)
            total += 2 * prod(product) * prod(left[d] for d in contracted)
        assert equation.primitive.name not in ("scan", "while", "cond"), "no block here has them"
        total += sum(matmul_flops(inner) for inner in jaxprs_in_params(equation.params))
    return total


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_costs_add_up_to_the_flops(num_ranks: int) -> None:
    flops = costs.count(costs.Sizes(layers=8, width=16, context=24, heads=2, vocabulary=100))
    made = flops.costs(num_layers=8, num_ranks=num_ranks)
    schedule = dpj.schedules.make("1f1b", num_ranks=num_ranks, num_microbatches=3)
    work = sum(dpj.simulate(schedule, costs=made, num_layers=8).work)
    of_layers = 8 * (flops.forward + flops.input_grad + flops.weight_grad)
    of_head = flops.head_forward + flops.head_backward
    assert work == pytest.approx(3 * (of_layers + of_head) / flops.forward)


def test_committed_figures_are_reproduced() -> None:
    rows = tables.read_csv(Row, FOLDER / "idle.csv")
    assert len(rows) == 4 * 4 * len(dpj.schedules.names())
    flops = costs.count(SIZES)
    small = [row for row in rows if row.ranks <= 8 and row.microbatches <= 8]
    assert len(small) == 3 * len(dpj.schedules.names())
    for row in small:
        made = replay(
            row.schedule,
            num_ranks=row.ranks,
            num_microbatches=row.microbatches,
            flops=flops,
            num_layers=64,
            transfer=0.14,
        )
        for name, value in vars(row).items():
            # Six digits are written.
            expected = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert getattr(made, name) == expected, (row.schedule, row.ranks, name)


def test_the_page_has_the_table_of_the_committed_figures(tmp_path: Path) -> None:
    rows = tables.read_csv(Row, FOLDER / "idle.csv")
    assert idle.make_table(rows) in PAGE.read_text()
    tables.write_csv(rows, tmp_path / "idle.csv", form=".6g")
    assert (tmp_path / "idle.csv").read_text() == (FOLDER / "idle.csv").read_text()


def test_figures_that_the_readme_names() -> None:
    rows = {
        (row.schedule, row.ranks, row.microbatches): row
        for row in tables.read_csv(Row, FOLDER / "idle.csv")
    }
    text = PAGE.read_text()
    of_64 = [rows[n, 8, 64] for n in ("dualpipe", "dualpipev", "zb-h1", "1f1b")]
    with_transfers = [f"{100 * row.with_transfers:.1f}" for row in of_64]
    assert "for {} % of the step, DualPipeV for {} %, ZB-H1 for {} % and 1F1B for {} %".format(
        *with_transfers
    ) in (text)
    equal = [f"{100 * row.equal:.1f}" for row in of_64]
    assert "says {}, {}, {} and {} %".format(*equal) in text
    without = [f"{100 * rows[n, 8, 64].without_false_waits:.1f}" for n in ("1f1b", "zb-h1")]
    assert "1F1B would be at {} %, ZB-H1 at {} %".format(*without) in text
    of_full = "1F1B idles for {} % and not {}, interleaved 1F1B for {} and not {}, ZB-H1 for {} and"
    of_64 = [rows[n, 8, 64] for n in ("1f1b", "interleaved-1f1b", "zb-h1")]
    both = [f"{100 * v:.1f}" for row in of_64 for v in (row.full_backward, row.with_transfers)]
    assert f"{of_full} not {{}}.".format(*both) in text
    late = [f"{100 * rows[n, 32, 64].with_transfers:.1f}" for n in ("dualpipev", "zb-h1")]
    assert "idles more ({} %) than ZB-H1 ({} %)".format(*late) in text


@pytest.mark.slow
def test_it_writes_figures_table_and_picture(tmp_path: Path) -> None:
    run_script("compare.idle", *SMALL.split(), output=tmp_path)
    rows = tables.read_csv(Row, tmp_path / "idle.csv")
    assert [(row.ranks, row.microbatches) for row in rows[:: len(dpj.schedules.names())]] == [
        (2, 4),
        (4, 8),
    ]
    for row in rows:
        schedule = dpj.schedules.make(
            row.schedule, num_ranks=row.ranks, num_microbatches=row.microbatches
        )
        idle = float((schedule.timeline().opcode == 0).mean())
        assert row.equal == pytest.approx(idle, abs=1e-6)
        if row.published is not None:
            assert row.equal <= row.published + 1e-6
        assert row.with_transfers >= row.transformer - 1e-6
        assert row.without_false_waits <= row.with_transfers + 1e-6
        assert row.uneven <= row.with_transfers + 1e-6
    lines = (tmp_path / "idle.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    picture = matplotlib.image.imread(tmp_path / "idle.png")
    assert picture[..., :3].std() > 0.05  # not blank


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--heads 5", "--width 4096: must be divisible by --heads 5"),
        ("--layers 12 --ranks 8", "--layers 12: fewer than the 16 stages that a schedule has"),
        ("--ranks 0", "Invalid value for '--ranks': 0 is not in the range x>=1"),
        ("--transfer -1", "Invalid value for '--transfer'"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(
    flags: str, message: str, refusal: Callable[..., str]
) -> None:
    printed = refusal(main, flags.split(), name="idle")
    assert message in printed
