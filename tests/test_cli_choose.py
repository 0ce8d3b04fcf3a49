"""`dualpipe-jax choose`: both formats, the effects of options, and the messages of mistakes."""

import ast
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import dualpipe_jax as dpj
from dualpipe_jax import _cli, schedules
from dualpipe_jax._predict import Costs, simulate
from dualpipe_jax._schedule.named import base_name
from tests.commands import broken_words, in_terminal, modules_after

COSTS = {"forward": 2.0, "input_grad": 3.0, "weight_grad": 1.0, "embed": 0.5, "head": 0.25}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(_cli.main, ["choose", *arguments], catch_exceptions=False)


def choices_of(*arguments: str) -> dict:
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_table_ranks_explains_and_ends_with_the_call() -> None:
    result = run("--ranks", "8", "--microbatches", "32")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.output.splitlines()
    assert lines[0].split()[:3] == ["schedule", "overlap", "step"]
    rows = lines[1 : lines.index("")]
    assert {base_name(row.split()[1]) for row in rows} == set(schedules.names())
    places = [row.split()[0] for row in rows]
    num_fits = sum(place.isdigit() for place in places)
    num_tight = places.count("tight")
    others = ["tight"] * num_tight + ["-"] * (len(rows) - num_fits - num_tight)
    assert places == [str(i + 1) for i in range(num_fits)] + others
    assert num_tight
    assert 0 < num_fits < len(rows)
    assert all("tight: leaves " in row for row in rows[num_fits : num_fits + num_tight])
    assert all("too large: most of it is " in row for row in rows[num_fits + num_tight :])
    assert all("%" in row and "too large" not in row for row in rows[:num_fits])
    best, overlap = rows[0].split()[1:3]
    execution = dpj.Execution(
        overlap=overlap == "yes",
        split_backward="full backwards" not in rows[0],
        deferred="store",
    )
    costs = Costs(**choices_of("--ranks", "8", "--microbatches", "32")["costs"])
    assert lines[-1] == (
        f'dpj.value_and_grad(model, mesh=mesh, num_microbatches=32, schedule="{best}", '
        f'remat="none", execution=dpj.{execution!r}, costs=dpj.{costs!r})'
    )
    assert f"memory of a rank, {best}, {execution}:" in lines


def test_numbers_of_microbatches_are_compared_in_one_unit() -> None:
    """Half as many are twice as large: costs and transfers take twice as long."""
    sizes = ["--ranks", "4", "--layers", "16", "--width", "1024", "--context", "1024"]
    both = choices_of(*sizes, "--microbatches", "16,8")["choices"]
    alone = choices_of(*sizes, "--microbatches", "8", "--microbatch-size", "2")["choices"]
    times = [choice["makespan"] for choice in alone if choice["schedule"] == "zb-h1"]
    of_eight = [c for c in both if (c["schedule"], c["microbatches"]) == ("zb-h1", 8)]
    assert [choice["makespan"] for choice in of_eight] == pytest.approx([2 * t for t in times])
    result = run(*sizes, "--microbatches", "16,8")
    heading, *rows = result.output.splitlines()
    column = heading.split().index("microbatches") + 1
    assert {row.split()[column] for row in rows[: rows.index("")]} == {"16", "8"}


def test_full_backwards_are_named() -> None:
    """1f1b's are the faster by a transformer's costs, and take less memory."""
    sizes = ["--ranks", "8", "--microbatches", "32", "--memory", "1TiB"]
    rows = [row for row in run(*sizes).output.splitlines() if " 1f1b " in row]
    assert len(rows) == 1
    assert "full backwards; " in rows[0]
    (choice,) = (c for c in choices_of(*sizes)["choices"] if c["schedule"] == "1f1b")
    assert choice["execution"]["split_backward"] is False
    # With little room it is the best, and the call says how to get it.
    lines = run(*sizes[:4], "--memory", "60GiB").output.splitlines()
    assert any(line.startswith("memory of a rank, 1f1b, no overlap, full b") for line in lines)
    assert "split_backward=False" in lines[-1]


def test_json_has_terms_that_add_up_to_the_memory() -> None:
    made = choices_of("--memory", "1TiB")
    assert made["memory"] == 2**40
    for choice in made["choices"]:
        assert choice["fits"]
        assert sum(choice["terms"].values()) == pytest.approx(choice["memory"])
    with_less = choices_of("--memory", "1TiB", "--optimizer-bytes", "0", "--remat", "block")
    for choice in with_less["choices"]:
        assert choice["terms"]["optimizer"] == 0


def test_options_reach_the_simulation(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"costs": COSTS, "more": 1}))
    sizes = ["--ranks", "4", "--microbatches", "8", "--layers", "10", "--transfer", "0.3"]
    made = choices_of(*sizes, "--costs-from", str(report), "--memory", "1TiB")
    assert made["costs"] == {
        **COSTS,
        "recompute": 0.0,
        "full_backward": None,
        "spill": 0.0,
        "fill": 0.0,
    }
    for choice in made["choices"]:
        expected = simulate(
            schedules.make(choice["schedule"], num_ranks=4, num_microbatches=8),
            costs=Costs(**COSTS),
            transfer=0.3,
            num_layers=10,
            layers_per_stage=choice["layers_per_stage"],
            execution=dpj.Execution(**choice["execution"]),
        )
        assert choice["makespan"] == expected.makespan
    ends = ["--embed", "0.5", "--head", "0.25"]
    stated = choices_of(*sizes, "--costs", "F=2,I=3,W=1", *ends, "--memory", "1TiB")
    assert stated == made


def test_a_report_may_leave_out_the_ends(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"costs": {**COSTS, "head": 0, "forward": 1}}))
    assert choices_of("--costs-from", str(report))["costs"]["head"] == 0
    costs = {name: COSTS[name] for name in ("forward", "input_grad", "weight_grad")}
    report.write_text(json.dumps({"costs": costs}))
    made = choices_of("--costs-from", str(report))
    # In the report's unit, in which a forward costs two.
    assert made["costs"]["head"] == pytest.approx(2 * choices_of()["costs"]["head"])
    assert made["costs"]["embed"] == 0
    assert made["transfer"] == pytest.approx(0.2)


DEFERRING = ("zb-h1", "interleaved-zb", "dualpipe", "dualpipev", "v-half")


def test_remat_recomputes_deferred_weight_grads_and_takes_less_memory() -> None:
    plain, remat = (
        choices_of("--memory", "1TiB"),
        choices_of("--memory", "1TiB", "--remat", "block"),
    )
    assert remat["costs"]["recompute"] == remat["costs"]["input_grad"]
    assert remat["costs"]["input_grad"] == pytest.approx(1 + plain["costs"]["input_grad"])
    least: dict[tuple[str, str], float] = {}
    for choice in plain["choices"]:
        key = choice["schedule"], choice["execution"]["overlap"]
        least[key] = min(choice["memory"], least.get(key, choice["memory"]))
    for choice in remat["choices"]:
        assert choice["memory"] < least[choice["schedule"], choice["execution"]["overlap"]]
        recomputed = choice["losses"]["recomputed"]
        assert (recomputed > 1e-9) == (base_name(choice["schedule"]) in DEFERRING)


def test_stated_bytes_replace_those_of_the_sizes() -> None:
    names = ("x", "residual", "weight-residual", "stash", "deferred", "working")
    stated = [f"--{name}-bytes={i}KiB" for i, name in enumerate(names)]
    stated += ["--layer-parameters", "7", "--ends-parameters", "9"]
    made = choices_of(*stated)
    assert list(made["layer_bytes"].values()) == [1024 * i for i in range(6)]
    assert (made["parameters"]["layer"], made["parameters"]["ends"]) == (7, 9)


def test_nothing_fits_is_said_after_the_table() -> None:
    result = run("--memory", "1GB")
    assert result.exit_code == 2
    assert result.stdout.count("too large") == result.stdout.count("most of it is") > 8
    assert "dpj.value_and_grad" not in result.stdout
    assert result.stderr.startswith("Error: --memory 954 MiB: nothing fits; the least is ")
    assert result.stderr.count("\n") == 1
    assert "--remat block" in result.stderr
    assert "--remat block" not in run("--memory", "1GB", "--remat", "block").stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "0"], ["--ranks 0"]),
        (["--microbatches", "0"], ["--microbatches", "'0'", "positive integers"]),
        (["--layers", "3"], ["num_layers=3", "at least the 8 stages"]),
        (["--layers", "0", "--width", "-4"], ["layers=0", "width=-4"]),
        (["--memory", "lots"], ["--memory", "'lots'", "80GiB"]),
        (["--memory", "-1GiB"], ["--memory", "'-1GiB'"]),
        (["--memory", "8GiBs"], ["--memory", "'8GiBs'"]),
        (["--costs", "Q=1"], ["'Q=1'", "F=1,I=1,W=1"]),
        (["--costs", "F=0"], ["forward=0.0"]),
        (["--headroom", "nan"], ["--headroom nan", "less than 1"]),
        (["--host-memory", "1GiB"], ["--host-memory 1 GiB", "--host-link", "--device"]),
        (["--host-memory", "9KiB"], ["--host-memory", "at least 1 MiB"]),
        (["--host-memory", "-1"], ["--host-memory", "'-1'"]),
        (["--host-link", "fast"], ["--host-link", "'fast'"]),
        (["--device", "v5e"], ["--device", "'v5e'", "TPU v5e"]),
        (["--transfer", "-1"], ["transfer=-1.0"]),
        (["--transfer", "1e308"], ["transfer=1e+308", "at most 1e+100"]),
        (["--heads", "7"], ["heads=7", "must divide width=4096"]),
        (["--layers", "9" * 26], ["layers=999", "at most 1,000,000,000,000"]),
        (["--width", "9" * 200], ["width=999", "at most 1,000,000,000,000"]),
        (["--head", "nan"], ["head=nan"]),
        (["--gradient-bytes", "-1"], ["gradient=-1.0"]),
        (["--remat", "all"], ["'all'", "'none'", "'block'"]),
        (["--costs-from", "nowhere.json"], ["nowhere.json", "No such file"]),
        (["--format", "csv"], ["'csv'", "'table'", "'json'"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["is not JSON"]),
        ("[]", ['an object "costs"']),
        ('{"costs": {"forward": 1, "input_grad": "2", "tail": 3}}', ["input_grad='2'", "tail=3"]),
        ('{"costs": {"forward": 1, "input_grad": 2}}', ["no weight_grad"]),
        ('{"costs": {"forward": -1, "input_grad": 2, "weight_grad": 1}}', ["forward=-1.0"]),
        ("[" * 200_000, ["is not JSON", "recursion"]),
        (
            f'{{"costs": {{"forward": {"1" * 400}, "input_grad": 2, "weight_grad": 1}}}}',
            ["report.json: forward: must be finite"],
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else None,
)
def test_a_bad_report_is_refused(tmp_path: Path, content: str, words: list[str]) -> None:
    report = tmp_path / "report.json"
    report.write_text(content)
    result = run("--costs-from", str(report))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_heads_divide_the_width_by_default() -> None:
    assert run("--width", "1000", "--attention", "plain").exit_code == 0  # 8 of them


def test_costs_are_given_once(tmp_path: Path) -> None:
    result = run("--costs", "F=1", "--costs-from", str(tmp_path / "report.json"))
    assert result.exit_code == 2
    assert "give one of them" in result.stderr


@pytest.mark.parametrize("columns", [80, 40])
def test_narrow_terminal_breaks_no_word_and_the_call_can_be_pasted(columns: int) -> None:
    colored, code = in_terminal(command="choose", columns=columns)
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    assert max(map(len, plain.splitlines())) <= columns
    whole = run().output
    narrow, call = plain.split("\ndpj.")
    expected, expected_call = whole.split("\ndpj.")
    assert not broken_words(narrow, expected)
    assert ast.unparse(ast.parse(call)) == ast.unparse(ast.parse(expected_call))
    text = " ".join(narrow.split())
    for choice in choices_of()["choices"]:
        assert f"{choice['makespan']:.4g}" in text
        assert choice["why"] in text


def test_imports_no_jax() -> None:
    arguments = ["choose", "--ranks", "2", "--microbatches", "4", "--memory", "1TiB"]
    imported = modules_after(
        f"from dualpipe_jax.__main__ import main; main({arguments}, standalone_mode=False)"
    )
    assert not imported & {"jax", "jaxlib", "flax", "matplotlib", "rich"}


def test_headroom_is_the_users() -> None:
    sizes = ["--ranks", "8", "--microbatches", "32"]
    for headroom, num_tight in (("0", 0), ("0.1", 5)):
        choices = choices_of(*sizes, "--headroom", headroom)["choices"]
        assert sum(choice["tight"] for choice in choices) == num_tight
        assert all(choice["fits"] for choice in choices[:9])
    assert run("--headroom", "1").exit_code == 2


def test_activations_wait_on_the_host_where_its_memory_is_given() -> None:
    sizes = ["--ranks", "4", "--microbatches", "16", "--layers", "32", "--memory", "60GiB"]
    host = [*sizes, "--host-memory", "64GiB", "--host-link", "32GB/s"]
    alone, made = choices_of(*sizes), choices_of(*host)
    on_host = [c for c in made["choices"] if c["execution"]["slots_on_device"] is not None]
    others = [dict(c) for c in made["choices"] if c not in on_host]
    assert [choice.pop("host_bytes") for choice in others] == [0] * len(others)
    assert others == alone["choices"]
    # 32 GB/s beside the peak of a TPU v5e, as the devices are not known.
    layer = made["layer_bytes"]
    forward = 2 * 4096 * (12 * 4096**2 + 2 * 4096 * 4096) / 197e12
    copy = (layer["residual"] + layer["weight_residual"]) / 32e9 / forward
    assert made["costs"]["spill"] == made["costs"]["fill"] == pytest.approx(copy)
    for choice in on_host:
        assert choice["fits"]
        assert 0 < choice["host_bytes"] <= 64 * 2**30
        expected = simulate(
            schedules.make(choice["schedule"], num_ranks=4, num_microbatches=16),
            costs=Costs(**made["costs"]),
            transfer=made["transfer"],
            num_layers=32,
            layers_per_stage=choice["layers_per_stage"],
            execution=dpj.Execution(**choice["execution"]),
        )
        assert choice["makespan"] == expected.makespan
    # dualpipe, which leaves too little to the compiler, is the best with slots on the host.
    best = made["choices"][0]
    assert (best["schedule"], best in on_host) == ("dualpipe", True)
    assert best["makespan"] < alone["choices"][0]["makespan"]
    lines = run(*host).stdout.splitlines()
    assert lines[0].split()[-3:] == ["memory", "host", "why"]
    assert best["why"] in lines[1]
    assert f"slots_on_device={best['execution']['slots_on_device']})" in lines[-1]


def test_a_device_has_a_memory_a_link_and_a_peak() -> None:
    sizes = ["--ranks", "2", "--microbatches", "4", "--width", "1024", "--layers", "8"]
    made = choices_of(*sizes, "--device", "H100 SXM", "--host-memory", "64GiB")
    figures = dpj.device_figures("H100 SXM")
    assert figures is not None
    names = ("memory", "host_link", "peak_flops")
    assert [made[name] for name in names] == [getattr(figures, name) for name in names]
    alone = choices_of(*sizes, "--device", "H100 SXM", "--memory", "80GiB")
    assert alone == choices_of(*sizes)
