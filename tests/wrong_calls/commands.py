"""The command line `dualpipe-jax` with one flag broken, or two.

A mistake must end in exit code 2 and one line on stderr, without a traceback.
"""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dualpipe_jax as dpj
from dualpipe_jax.__main__ import main as dualpipe_jax_main
from tests.wrong_calls import flags as of
from tests.wrong_calls.mistakes import Mistake, but, mistake
from tests.wrong_calls.oracle import Target

_MOST_IN_LINE = 3000


class Refused(Exception):  # noqa: N818 - it is the wanted end
    """Stands for exit code 2 and one line on stderr."""


class Accepted(Exception):  # noqa: N818 - it is no error
    """Ends an experiment where its flags have been checked, before it does any work."""


def run(main: Callable[[list[str]], Any], command: Sequence[str], flags: Mapping[str, Any]) -> None:
    """Runs a command line in this process.

    Raises:
      Refused: With the line, if the command refuses its flags as it should.
      AssertionError: If it ends in another way.
    """
    args, alone = [*command], []
    for name, value in flags.items():
        if value is of.ALONE:
            alone.append(f"--{name}")
        else:
            args += [f"--{name}", str(value)]
    # One, at the end, where no other flag is taken for its value.
    args += alone[-1:]
    out, err, code = io.TextIOWrapper(io.BytesIO()), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as done:
            code = done.code
        except Accepted:
            code = 0
    if code in (0, None):
        return
    line = err.getvalue()
    assert code == 2, f"exit code {code}: {line[:500]}"
    out.flush()
    printed = out.buffer.getvalue()
    assert not printed, f"stdout before a refusal: {printed[:500]}"
    assert line.count("\n") == 1, f"not one line: {line[:500]}"
    assert not command or len(line) <= _MOST_IN_LINE, f"{len(line)} characters: {line[:200]}"
    raise Refused(line)


def _main(args: list[str]) -> None:
    dualpipe_jax_main(args, prog_name="dualpipe-jax")


def _command(name: str, valid: dict[str, Any], **more: Any) -> Target:
    return Target(
        name=f"dualpipe-jax {name}",
        call=lambda **given: run(_main, [name], given),
        valid=valid,
        raises=(Refused,),
        **more,
    )


_SIZES = {"ranks": "2", "microbatches": "4"}
_TABLE_OR_JSON = of.choices(("table", "json"))


def _of_schedule() -> dict[str, list[Mistake]]:
    return {
        "schedule": of.choices(dpj.schedules.names(), "schedule"),
        "ranks": of.counts("num_ranks"),
        "microbatches": of.counts("num_microbatches"),
        "stages-per-rank": of.counts("num_stages_per_rank"),
        "overlap": of.choices(("yes", "no", "two-tick")),
    }


def _host_memories() -> list[Mistake]:
    return [*of.sizes_in_bytes(), mistake("number far too small", "1", "0.5", "1023KiB")]


def _choose() -> Target:
    counts = ("heads", "width", "context", "vocabulary", "microbatch-size", "activation-bytes")
    floats = ("parameter-bytes", "gradient-bytes", "optimizer-bytes", "layer-parameters")
    in_bytes = ("x", "residual", "weight-residual", "stash", "deferred", "working")
    return _command(
        "choose",
        {**_SIZES, "layers": "8", "width": "64", "heads": "4", "context": "64"},
        mistakes={
            "ranks": of.counts("num_ranks"),
            "microbatches": of.counts("num_microbatches"),
            "layers": of.counts("num_layers"),
            "memory": of.sizes_in_bytes(),
            "headroom": [*of.amounts(), mistake("number far too large", "1", "1.5", "1e300")],
            "host-memory": _host_memories(),
            "host-link": [*of.sizes_in_bytes(), mistake("zero", "0", "0GB/s")],
            "device": of.choices(("TPU v5e",)),
            "costs": of.costs_texts(),
            "costs-from": of.costs_files(),
            **{name: of.amounts() for name in ("embed", "head", "transfer")},
            **{name: of.counts(name.replace("-", "_")) for name in counts},
            "attention": of.choices(("fused", "plain")),
            "remat": of.choices(("none", "block")),
            **{name: of.amounts(name.split("-")[0]) for name in floats},
            **{f"{name}-bytes": of.sizes_in_bytes() for name in in_bytes},
            "format": _TABLE_OR_JSON,
        },
        weight=3,
    )


def _preflight() -> Target:
    tiny = {"layers": "4", "width": "8", "heads": "2", "context": "4", "vocabulary": "16"}
    return _command(
        "preflight",
        {"topology": "cpu:2", **_SIZES, **tiny, "microbatch": "1", "dtype": "float32"},
        is_slow=True,
        mistakes={
            **_of_schedule(),
            "topology": [
                *of.choices(("cpu:2",)),
                mistake("unknown name", "tpu", "tpu:v4:2x4", "gpu:a100:8", "cpu:", "cpu:-4"),
                mistake("number far too large", "cpu:99999", "tpu:v5e:99999x99999"),
            ],
            **{name: of.counts(too_large=False) for name in (*tiny, "microbatch")},
            "slots-on-device": [
                *of.sizes_in_bytes(),
                mistake("zero", "0"),
                mistake("float for an integer", "1.5", "-1.5"),
            ],
            "host-link": [*of.sizes_in_bytes(), mistake("zero", "0", "0GB/s")],
            "dcn": [*of.sizes_in_bytes(), mistake("zero", "0", "0GB/s")],
            "host-memory": _host_memories(),
            "remat": of.choices(("none", "block")),
            "dtype": of.choices(("bfloat16", "float32")),
            "format": _TABLE_OR_JSON,
        },
    )


def targets() -> list[Target]:
    """Lists the commands of `dualpipe-jax`."""
    of_schedule = _of_schedule()
    return [
        Target(
            name="dualpipe-jax",
            call=lambda command: run(_main, [command], {}),
            valid={"command": "timeline"},
            mistakes={
                "command": [
                    mistake(
                        "unknown name", "timelines", "Timeline", "time", "-", also=("command",)
                    ),
                    mistake("odd characters", "\udcff", "\x00", "\n", also=("command",)),
                    mistake("very long text", "x" * 100_000, also=("command",)),
                ]
            },
            raises=(Refused,),
            takes_more=True,
        ),
        _command(
            "timeline",
            _SIZES,
            mistakes={
                **of_schedule,
                "layers": of.counts(),
                "x-bytes": of.sizes_in_bytes(),
                "format": of.choices(("text", "csv", "json", "svg", "png", "perfetto", "html")),
                "output": of.outputs(),
            },
            weight=2,
        ),
        _command(
            "simulate",
            {**_SIZES, "schedule": "dualpipe"},
            mistakes={
                **of_schedule,
                "costs": of.costs_texts(),
                **{name: of.amounts() for name in ("transfer", "embed", "head")},
                "layers": of.counts("num_layers"),
                "format": _TABLE_OR_JSON,
            },
            weight=2,
        ),
        _command(
            "search",
            {**_SIZES, "moves": "5", "activation-bytes": "1MiB"},
            mistakes={
                "placement": of.choices(("linear", "v", "interleaved", "bidirectional")),
                "ranks": of.counts("num_ranks"),
                "microbatches": of.counts("num_microbatches"),
                "costs": of.costs_texts(),
                **{name: of.amounts() for name in ("transfer", "embed", "head")},
                "max-activations": [
                    mistake("too little", "0.5", "-1", "nan", "x", also=("max_activations",))
                ],
                "memory": [
                    *of.sizes_in_bytes(),
                    mistake("too little", "0", "1KiB", "1023.9KiB"),
                ],
                "activation-bytes": [
                    *of.sizes_in_bytes("activation_bytes"),
                    mistake("too little", "0", "0.5B", also=("activation_bytes",)),
                ],
                "stash-bytes": of.sizes_in_bytes("stash_bytes"),
                "layers-per-stage": [
                    mistake("malformed", "1;2", "", "x", "0.5,1"),
                    mistake("too many", "1,2,3", also=("layers_per_stage",)),
                ],
                "stages-per-rank": [
                    mistake("for another placement", "2", "x", also=("num_stages_per_rank",))
                ],
                "waits": of.choices(("program", "values")),
                "moves": [mistake("out of range", "-1", "x", "99999999999999")],
                "seed": [mistake("out of range", "-1", "x")],
                "output": but(of.outputs(), "unknown suffix"),
            },
        ),
        _choose(),
        _preflight(),
    ]
