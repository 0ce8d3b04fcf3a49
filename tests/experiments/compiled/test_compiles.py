"""The questions to compilers: read once, kept in a file, and refused in one line."""

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments.compiled import backwards, compiles, memory, overlap
from experiments.compiled.compiles import EXCHANGE, PERMUTE, Compiles, Count, Figures
from experiments.compiled.steps import Case, Step
from tests.experiments.compiled.figures import figures_of
from tests.preflight.steps import make_args, make_mesh, make_step


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A step of the preflight tests, for CPUs."""

    overlap: bool
    topology: str = "cpu:4"

    def make(self) -> Step:
        mesh = make_mesh(4)
        fn, args = make_step(mesh, overlap=self.overlap), make_args(mesh)
        return Step(fn=fn, args=args, mesh=mesh)


def test_a_case_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, case = tmp_path / "compiles.jsonl", Tiny(overlap=False)
    first = Compiles(path)(case)
    assert (first.loop, first.fits, first.account) == ("ramp", True, "")
    permutes = first.count(PERMUTE)
    # CPUs hide nothing.
    assert permutes.total > 0
    assert permutes.num_async == permutes.num_hidden == permutes.num_covered == 0
    assert first.count(EXCHANGE) == Count()
    assert "FLOP" in first.text

    def fail(*_: Any) -> Figures:
        raise AssertionError("it is in the file")

    monkeypatch.setattr(compiles, "compile_case", fail)
    assert Compiles(path)(case) == first
    with pytest.raises(AssertionError, match="in the file"):
        Compiles(path)(dataclasses.replace(case, overlap=True))
    # Nor does it stand for the same case of another library.
    monkeypatch.setattr(compiles, "_compilers", lambda: {"jax": "1.0"})
    with pytest.raises(AssertionError, match="in the file"):
        Compiles(path)(case)


def test_without_the_compiler_it_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        overlap.main(["--question", "gpu", "--output", str(tmp_path)])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("overlap: topology='gpu:h100:8': needs a compiler")
    assert "pip install 'jax[cuda13]'" in line


def test_memory_has_a_line_for_every_row() -> None:
    case = memory.Case(
        topology="tpu:v5e:2x2",
        ranks=4,
        layers=4,
        width=128,
        heads=1,
        sequence=128,
        vocabulary=128,
        microbatch_size=1,
    )
    recipe = dataclasses.replace(case, schedule=memory.RECIPE, microbatches=4)
    mebi = 2**20
    rows = [
        memory.Row(case=case, figures=figures_of(peak=3 * mebi, arguments=mebi, terms=3 * mebi)),
        memory.Row(case=dataclasses.replace(recipe, remat="block"), figures=figures_of(peak=mebi)),
        memory.Row(case=recipe, figures=figures_of(needed=2**30, arguments=mebi, fits=False)),
    ]
    table = memory.tables.markdown(memory.COLUMNS, rows)
    assert table.splitlines()[2:] == [
        "| dualpipe | none | 16 | 2.0 | 3 | 1.50 |",
        "| gpipe-recipe | block | 4 | 1.0 | - | - |",
        "| gpipe-recipe | none | 4 | 1,024.0, does not fit | - | - |",
    ]
    asked = memory.cases(case, ("1f1b", "zb-h1"), ("none",))
    assert [(each.schedule, each.microbatches) for each in asked] == [
        *(("1f1b", 16), ("1f1b", 64), ("zb-h1", 16)),
        *((memory.RECIPE, 16), (memory.RECIPE, 64)),
    ]


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (overlap.main, "--width 130", "--width 130: must be a multiple of 128"),
        (overlap.main, "--question speed", "--question"),
        (backwards.main, "--width 130", "--width 130: must be a multiple of 128"),
        (backwards.main, "--layers 1", "1 is not in the range"),
        (backwards.main, "--ranks 4", "No such option"),
        (memory.main, "--layers 6", "--layers 6: must be a multiple of 4, --ranks"),
        (memory.main, "--width 0", "0 is not in the range"),
        (memory.main, "--schedule gpipes", "'gpipes' is not one of"),
        (memory.main, "--remat all", "'all' is not one of"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(
    main: Any, flags: str, message: str, refusal: Callable[..., str]
) -> None:
    name = main.__module__.rpartition(".")[2]
    assert message in refusal(main, flags.split(), name=name)


def test_questions_share_their_compiles() -> None:
    """A transformer beside a steady phase is asked for twice, for two tables."""
    sizes: Any = {"widths": (1024, 2048), "layers": (2,)}
    asked = backwards.cases("dualpipe", tokens=4096, **sizes)
    efficiency = overlap.cases("efficiency", **sizes)
    assert set(efficiency) <= set(asked)
    assert isinstance(asked[0], Case)
