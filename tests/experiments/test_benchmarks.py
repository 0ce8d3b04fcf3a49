"""The benchmarks, small: variants run and agree, the figures have the right names.

No test here looks at how long anything takes.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualpipe_jax as dpj
from experiments import documents
from experiments.benchmarks import racing, report, variants
from experiments.benchmarks.benchmarks import describe_agreement, main, require_agreement
from experiments.benchmarks.tasks import Compiled, Sizes, Step, Task
from experiments.train_lm.model import LanguageModel
from tests.commands import run_script

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "benchmarks"
TINY = "--ranks 2 --rounds 1 --layers 4 --width 16 --heads 2 --sequence 16 --vocabulary 32"
# Two layers a stage are unrolled by any recipe, and by the library.
FEW_LAYERS = {variants.UNROLLED_RECIPE, *variants.LOOPED}
# Each takes a process of its own: one of every kind, and both of the orders that XLA is asked for.
# Schedules and their options have gradients of their own tests.
NAMES = (variants.CONCURRENT_LIMIT, "limit-scanned", variants.RECIPE, "dualpipe", "1f1b")
# A variant that the library cannot run yet says so when it runs.
SIZES = Sizes(layers=4, width=16, heads=2, sequence=16, vocabulary=32, microbatch_size=2, seed=0)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the script as a user does, with fake devices of its own."""
    folder = tmp_path_factory.mktemp("benchmarks")
    variants = [f"--variant={name}" for name in NAMES]
    said = run_script(
        "benchmarks.benchmarks", *TINY.split(), "--remat", "block", *variants, output=folder
    )
    assert "gradient norms within" in said
    return folder


def records_of(folder: Path, subject: str) -> list[dict[str, Any]]:
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["what"] == subject]


@pytest.mark.slow
def test_variants_run_and_agree(output: Path) -> None:
    compiled = {record["variant"]: record for record in records_of(output, "compiled")}
    assert tuple(compiled) == NAMES
    limit = compiled["limit-scanned"]
    assert limit["loss"] == pytest.approx(np.log(32), abs=0.2)
    assert len(limit["gradient_norms"]) == 1 + 4
    # Those of different layers differ: an exchange of two would show.
    assert np.abs(np.diff(limit["gradient_norms"])).min() > 1e-3 * limit["gradient_norms"][-1]
    for name, record in compiled.items():
        # Float32 sums in another order.
        assert record["loss"] == pytest.approx(limit["loss"], rel=1e-5), name
        np.testing.assert_allclose(
            record["gradient_norms"], limit["gradient_norms"], rtol=1e-5, err_msg=name
        )
    # Half of the layers on a device.
    assert compiled["1f1b"]["argument_bytes"] < limit["argument_bytes"]
    assert compiled["dualpipe"]["argument_bytes"] == compiled["gpipe-recipe"]["argument_bytes"]


@pytest.mark.slow
def test_every_variant_takes_its_steps(output: Path) -> None:
    steps = records_of(output, "step")
    assert sorted(step["variant"] for step in steps) == sorted(NAMES)
    for step in steps:
        assert step["wall_seconds"] > 0
        assert step["cpu_seconds"] > 0


@pytest.mark.slow
def test_the_table_has_every_variant(output: Path) -> None:
    head, rule, *lines = (output / "table.md").read_text().split("\n\n")[0].splitlines()
    assert all(line.count("|") == head.count("|") == rule.count("|") for line in lines)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert tuple(row[2].removesuffix(r" \*") for row in cells) == NAMES
    stars = [row[2] for row in cells if row[2].endswith(r" \*")]
    assert [name.partition("-")[0] for name in stars] == ["limit", "gpipe"]
    assert {(row[0], row[1]) for row in cells} == {("2", "block")}


@pytest.mark.parametrize(
    ("remat", "num_ranks", "left_out"),
    [
        ("none", 2, {"zb-h1-stash"}),
        ("block", 2, set()),
        ("block", 4, FEW_LAYERS),
    ],
)
def test_no_program_runs_twice(remat: str, num_ranks: int, left_out: set[str]) -> None:
    names = variants.different(remat=remat, num_layers=16, num_ranks=num_ranks)
    assert set(variants.NAMES) - set(names) == left_out


def test_xla_takes_the_order_that_a_variant_asks_for() -> None:
    """Eight independent products are alive one at a time, or all at once."""

    def products(x: jax.Array) -> jax.Array:
        each = (jnp.sort(jnp.tanh(x @ (x + i)), axis=0)[0].sum() for i in range(8))
        return sum(each, jnp.zeros(()))

    def temporaries(name: str) -> int:
        step = jax.jit(products).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32))
        memory = step.compile(variants.compiler_options(name)).memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert 3 * temporaries("dualpipe") < temporaries(variants.CONCURRENT_LIMIT)


def test_workers_ask_for_huge_pages_beside_the_users_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    assert racing.environment(huge_pages=False) == dict(os.environ)
    wanted = "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    assert racing.environment(huge_pages=True) == {**os.environ, "GLIBC_TUNABLES": wanted}
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert racing.environment(huge_pages=True)["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


LM = LanguageModel(layers=4, width=8, heads=2, vocabulary=16)


def make_variant(name: str, *, remat: str) -> tuple[variants.GradFn, Any]:
    sizes = {"num_layers": 4, "num_ranks": 2, "num_microbatches": 4}
    return variants.make(name, model=LM.for_pipeline(), remat=remat, **sizes)


@functools.cache
def expected() -> Any:
    """Makes parameters and a batch, and the sequential model's loss and gradients of them."""
    params = jax.jit(LM.init)(jax.random.key(0))
    batch = np.random.default_rng(0).integers(0, 16, size=(8, 9)).astype(np.int32)
    loss_fn = dpj.sequential(LM.for_pipeline(), num_microbatches=4)
    return params, batch, jax.jit(jax.value_and_grad(loss_fn))(params, batch)


@pytest.mark.parametrize("name", ["limit-grouped", *variants.RECIPES])
def test_variants_it_is_compared_with_are_the_model(name: str) -> None:
    with jax.enable_x64(False):
        params, batch, want = expected()
        grad_fn, mesh = make_variant(name, remat="none")
        assert mesh.size == (2 if name in variants.RECIPES else 1)
        got = jax.jit(grad_fn)(params, batch)
        for (path, w), g in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
            # Float32; the biases of keys have a gradient of zero but for rounding.
            np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("name", sorted(set(variants.OURS) - {*NAMES, *variants.LOOPED}))
def test_other_variants_are_steps_of_the_library(name: str) -> None:
    """Traced, so that their options are checked, and not compiled."""
    with jax.enable_x64(False):
        params, batch, want = expected()
        grad_fn, mesh = make_variant(name, remat="block")
        assert mesh.size == 2
        got = jax.eval_shape(grad_fn, params, batch)
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)


@pytest.mark.slow
def test_a_variant_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    bad, good = (
        racing.Result(task=Task(variant=name, ranks=2, microbatches=2, remat=remat, sizes=SIZES))
        for name, remat in (("1f1b", "all"), ("limit-scanned", "none"))
    )
    heard: list[Any] = []
    turns = racing.race(
        [bad, good],
        num_rounds=1,
        huge_pages=True,
        logs=tmp_path,
        record=lambda _, came: heard.append(came),
    )
    assert len(list(turns)) == 4
    assert bad.failure is not None
    assert "remat='all': must be" in bad.failure
    assert bad.steps == []
    assert good.failure is None
    assert heard == [bad.failure, good.compiled, *good.steps]
    rows = report.summarize([bad])
    with pytest.raises(click.ClickException, match="1f1b on 2 ranks with remat all failed, exit"):
        require_agreement(rows)


def result(
    variant: str, *, seconds: list[float], loss: float = 4.0, norm: float = 1.0, mib: int = 1
) -> racing.Result:
    """Makes one that has run."""
    task = Task(variant=variant, ranks=2, microbatches=8, remat="none", sizes=SIZES)
    return racing.Result(
        task=task,
        compiled=Compiled(
            compile_seconds=1.0,
            temporary_bytes=mib * 2**20,
            argument_bytes=0,
            output_bytes=0,
            peak_bytes=None,
            loss=loss,
            gradient_norms=[1.0, norm],
        ),
        steps=[
            Step(wall_seconds=s / 2, cpu_seconds=s, resident_bytes=None, loss=loss) for s in seconds
        ],
    )


def test_the_fastest_limit_counts_and_ratios_are_of_a_round() -> None:
    rows = report.summarize(
        [
            result("limit-unrolled", seconds=[3, 2, 2]),
            result("limit-scanned", seconds=[1, 1, 4]),
            result("gpipe-recipe", seconds=[6, 6, 6], mib=8),
            result("1f1b", seconds=[2, 3, 12], mib=2),
        ]
    )
    assert [row.is_limit for row in rows] == [False, True, False, False]
    assert [row.cpu_seconds for row in rows] == [2, 1, 6, 3]
    assert [row.cpu_to_limit for row in rows] == [2, 1, 6, 3]
    assert [row.wall_to_recipe for row in rows] == [None, None, 1, 0.5]
    assert [row.cpu_to_recipe for row in rows] == [None, None, 1, 0.5]
    assert [row.temporary_to_recipe for row in rows] == [None, None, 1, 0.25]
    assert r"| 2 | none | limit-scanned \* | 0.500 | 1.000 | 1.00 | - |" in (
        report.to_markdown(rows)
    )


@pytest.mark.parametrize(
    "wrong", [{"loss": 4.001}, {"norm": 1.001}, {"loss": np.nan}, {"norm": np.nan}]
)
def test_differing_results_are_an_error(wrong: dict[str, Any]) -> None:
    limit = result("limit-scanned", seconds=[1])
    good = result("1f1b", seconds=[1], loss=4.00004, norm=1.00002)
    rows = report.summarize([limit, good])
    require_agreement(rows)
    assert describe_agreement(rows) == (
        "losses within 1e-05, gradient norms within 2e-05, relative"
    )
    rows = report.summarize([limit, good, result("zb-h1", seconds=[1], **wrong)])
    with pytest.raises(click.ClickException, match=r"by more than 0.0001: zb-h1 on 2 ranks"):
        require_agreement(rows)


def test_the_committed_table_has_these_columns() -> None:
    head, *_ = documents.read_from(FOLDER / "table.md").splitlines()
    assert head == report.to_markdown([]).splitlines()[0]


def test_a_task_survives_the_pipe() -> None:
    task = Task(variant="1f1b", ranks=2, microbatches=8, remat="none", sizes=SIZES)
    assert Task.from_dict(json.loads(json.dumps(dataclasses.asdict(task)))) == task


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--heads 5", "--width 256: must be divisible by --heads 5"),
        ("--layers 18", "--layers 18: must be divisible by --ranks 4, 8; the usual recipe"),
        ("--layers 8", "--layers 8: fewer than the 16 stages that a schedule has over 8 ranks"),
        ("--variant zigzag", "Invalid value for '--variant': 'zigzag' is not one of"),
        ("--remat all", "Invalid value for '--remat': 'all' is not one of"),
        ("--ranks 0", "Invalid value for '--ranks': 0 is not in the range x>=1"),
        ("--rounds 0", "Invalid value for '--rounds': 0 is not in the range x>=1"),
        ("--layers 18 --heads 5", "--heads 5; --layers 18"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(
    flags: str, message: str, refusal: Callable[..., str]
) -> None:
    printed = refusal(main, flags.split(), name="benchmarks")
    assert message in printed
