"""Mistakes in the arguments of which a step is made: mesh, axes, specs, masks, schedule, dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st
from jax import P

import dualpipe_jax as dpj
from tests.wrong_calls import users
from tests.wrong_calls.mistakes import (
    Mistake,
    UsersError,
    always,
    amounts,
    but,
    counts,
    functions,
    left_out,
    memories,
    mistake,
    names,
    too_small_on_host,
    wrong_type,
)
from tests.wrong_calls.users import MESH, MODEL, ROWS

_AXES = ("pipe", "data")


def model_mistakes() -> list[Mistake]:
    """Mistakes in the model as a whole."""
    return [wrong_type(), left_out(), mistake("class for an object", dpj.Model, type(MODEL))]


def count_mistakes() -> list[Mistake]:
    """Mistakes in num_microbatches; a legal number may not fit the batch."""
    return [*counts(most=10**7), left_out(), mistake("number that does not divide", 3, 8, 100)]


def axis_mistakes() -> list[Mistake]:
    return names(_AXES)


def axes_mistakes(legal: tuple[Any, ...]) -> list[Mistake]:
    """Mistakes in several axes of the mesh other than the pipeline's."""
    return [
        wrong_type(lambda v: v in ((), []) if isinstance(v, tuple | list) else False),
        mistake("wrong mesh axis", "model", ("model",), ("data", "model"), "Data", ""),
        mistake("the pipeline's own axis", "pipe", ("pipe",), ("data", "pipe"), ["pipe"]),
        mistake("axis named twice", ("data", "data"), ["data"] * 3, ("data",) * 20_000),
        mistake("bytes for text", b"data", (b"data",)),
        mistake("number for a name", 0, (0,), (1, "data")),
        mistake("nested", (("data",),), [["data"]], (None,)),
        mistake("odd characters", st.text(max_size=12).filter(lambda t: t != "data")),
        mistake("another form", *legal, legal=always),
    ]


def mesh_mistakes() -> list[Mistake]:
    """Mistakes in a mesh."""
    abstract = jax.sharding.AbstractMesh((2, 2), _AXES)
    return [
        wrong_type(),
        left_out(),
        mistake(
            "wrong mesh axis",
            users.make_mesh(2, 2, names=("stage", "data")),
            users.make_mesh(2, names=("data",)),
            also=("axis",),
        ),
        mistake("mesh of another size", users.make_mesh(8), also=("params", "num_layers")),
        mistake("devices for a mesh", jax.devices(), np.array(jax.devices()).reshape(2, 4)),
        mistake("shape for a mesh", (2, 2), {"pipe": 2}),
        mistake("sharding for a mesh", jax.NamedSharding(MESH, P()), P("pipe")),
        mistake(
            "another kind of mesh",
            abstract,
            users.make_mesh(2),
            users.make_mesh(2, 2),
            legal=always,
        ),
    ]


def _with(argument: Any, path: tuple[str, ...], *values: Any) -> list[Any]:
    return [users.with_leaf(argument, path, value) for value in values]


_SPECS: dict[str, Any] = {"ends": P(), "blocks": {"w": P(), "b": P()}}


def specs_mistakes(*, is_legal_over_pipe: bool = True) -> list[Mistake]:
    """Mistakes in trees of PartitionSpecs."""
    in_blocks, in_ends = ("blocks", "w"), ("ends",)
    return [
        wrong_type(lambda v: v is None),
        mistake("missing key", {}, users.without(_SPECS, "ends"), users.without(_SPECS, "blocks")),
        mistake("extra key", {**_SPECS, "more": P()}, {**_SPECS, 3: P()}),
        mistake(
            "wrong mesh axis",
            *_with(_SPECS, in_blocks, P(None, "model"), P("model")),
            *_with(_SPECS, in_ends, P("model"), P(("model", "pipe"))),
        ),
        mistake("axis named twice", *_with(_SPECS, in_ends, P(("data", "data")))),
        mistake("too many entries", *_with(_SPECS, in_ends, P(None, None, None, "data"))),
        mistake(
            "text for a leaf",
            *_with(_SPECS, in_blocks, "pipe", ("pipe",), b"pipe"),
            *_with(_SPECS, in_ends, "pipe", 3),
        ),
        mistake("number for a name", *_with(_SPECS, in_ends, P(3), P((1,)), P(b"pipe"))),
        mistake("wrong structure", *_with(_SPECS, ("blocks",), {"w": P()}, [P(), P()], {})),
        mistake("sharding for a spec", *_with(_SPECS, in_ends, jax.NamedSharding(MESH, P()))),
        mistake("another form", _SPECS, None, P(), legal=always),
    ]


def mask_mistakes() -> list[Mistake]:
    """Mistakes in trees of bools, or in functions that make them."""
    tree: dict[str, Any] = {"ends": True, "blocks": {"w": False, "b": True}}
    return [
        wrong_type(lambda v: isinstance(v, bool) or callable(v) or v is None),
        mistake("missing key", {}, users.without(tree, "ends"), users.without(tree, "blocks", "w")),
        mistake("extra key", {**tree, "more": True}, {**tree, 3: True}),
        mistake("number for a bool", *_with(tree, ("ends",), 0, 1, 2.0, np.ones(2))),
        mistake("text for a bool", *_with(tree, ("blocks", "w"), "True", "", b"yes")),
        mistake("None for a leaf", *_with(tree, ("blocks", "w"), None), {**tree, "ends": None}),
        mistake("wrong structure", *_with(tree, ("blocks",), [True, False], {"v": True})),
        mistake("function of other arguments", lambda: True, lambda a, b: a),
        mistake("function that returns nonsense", *map(users.returns, (3, "x", {}, {"ends": 1}))),
        mistake("function that raises", users.raises, raises=UsersError),
    ]


def sizes_mistakes() -> list[Mistake]:
    """Mistakes in the layers of each stage: 2 stages of 4 layers."""
    return [
        wrong_type(lambda v: v is None),
        mistake("too many", (1, 1, 2), (4,) * 50_000, [1] * 4),
        mistake("too few", (4,), [], ()),
        mistake("wrong sum", (2, 3), (1, 1), (10**9, 1)),
        mistake("zero", (0, 0), [0, 0]),
        mistake("negative number", (-1, 5), (5, -1)),
        mistake("float for an integer", (2.0, 2.0), (float("nan"), 2), np.ones(2)),
        mistake("bool for a number", (True, 3), (3, True)),
        mistake("text for a number", "22", ("2", "2"), b"\x02\x02"),
        mistake("number far too large", (10**13, 1), (10**400, 1), (2**63, 2)),
        mistake("set or dict for a sequence", {2}, {0: 2, 1: 2}, {1, 3}),
        mistake("another form", [1, 3], (4, 0), np.array([2, 2]), range(1, 4, 2), legal=always),
        mistake("word for a sequence", "even", "balance", "Balanced", b"balanced"),
    ]


def costs_of_kinds() -> Mistake:
    """Costs of kinds, beside no layout that names them."""
    return mistake("costs without a layout", dpj.Costs(layer={"dense": 1.0}))


def schedule_mistakes() -> list[Mistake]:
    """Mistakes in a schedule for 2 ranks and 2 microbatches."""
    make = dpj.schedules.make
    fits = {"num_ranks": 2, "num_microbatches": 2}
    return [
        *names(dpj.schedules.names(), extra=lambda v: isinstance(v, dpj.Schedule)),
        mistake(
            "unknown option",
            *("1f1b(num_stages_per_rank=2)", "interleaved-1f1b(stages=2)", "zb-h1(num_deferred=r)"),
            *(
                "interleaved-1f1b(",
                "interleaved-1f1b()x",
                "interleaved-1f1b(num_stages_per_rank=0)",
            ),
            "interleaved-paired(num_stages_per_rank=1)",
            also=("num_stages_per_rank",),
        ),
        mistake(
            "schedule of another size",
            make("1f1b", num_ranks=3, num_microbatches=2),
            make("1f1b", num_ranks=2, num_microbatches=4),
            also=("params",),
        ),
        mistake("schedule without backwards", dpj.Schedule.from_csv("0F0,0F1\n1F0,1F1")),
        mistake("program for a schedule", make("1f1b", **fits).program, dpj.schedules.dualpipe),
        mistake("another form", make("zb-h1", **fits), "gpipe", "chimera", legal=always),
    ]


def remat_mistakes() -> list[Mistake]:
    """Mistakes in rematerialisation."""
    policies = jax.checkpoint_policies
    return [
        *(each for each in names(("none", "block"), extra=callable)),
        mistake("another library's value", True, False, None, "full", "all", "nothing"),
        mistake("function of other arguments", policies.save_only_these_names, lambda *, key: key),
        mistake("another form", "block", policies.nothing_saveable, legal=always),
    ]


def dtype_mistakes() -> list[Mistake]:
    """Mistakes in the dtype of gradients."""
    floats = ("float16", jnp.bfloat16, np.float32, None, jnp.dtype("float64"), float)
    return [
        wrong_type(lambda v: v is None or isinstance(v, np.dtype)),
        mistake(
            "unknown name",
            "float33",
            "half precision",
            "f",
            "bf16",
            "x" * 50_000,
            legal=lambda v: v == "f",
        ),
        mistake("wrong dtype", int, "int32", bool, "complex64", np.str_, object, "S3", "M8[D]"),
        mistake("odd characters", st.text(max_size=6).filter(_is_no_dtype)),
        mistake("another form", *floats, legal=always),
    ]


def _is_no_dtype(text: str) -> bool:
    try:
        return not jnp.issubdtype(jnp.dtype(text), jnp.inexact)
    except (TypeError, ValueError):
        return True
    except Exception:  # noqa: BLE001 - NumPy parses such texts, and fails in many ways
        return True


def of_type(*legal: Any) -> list[Mistake]:
    """Mistakes in an argument of one type of this library."""
    return [
        wrong_type(lambda v: v is None and None in legal),
        mistake("class for an object", *(type(v) for v in legal if v is not None)),
        mistake("another form", *legal, legal=always),
    ]


def output_mistakes() -> list[Mistake]:
    """Mistakes in the function whose outputs `apply` gives."""
    wrong = (None, "text", object(), [], {}, len, 3.0, jnp.ones(()), jnp.ones((ROWS + 3, 2)))
    return [
        *functions(optional=True),
        mistake("function that returns nonsense", *map(users.returns, wrong)),
        mistake("function that raises", users.raises, raises=UsersError),
        mistake(
            "another form",
            users.changes(users.errors_of_rows, lambda y: {"y": y, "z": y > 0}),
            legal=always,
        ),
    ]


def tree_mistakes() -> list[Mistake]:
    """Mistakes in the tree whose shardings are asked for; any tree of arrays is legal."""
    return [
        left_out(),
        mistake("text for a leaf", {"blocks": {"w": "text"}}, "text", also=("tree", "blocks")),
        mistake("object for a leaf", {"blocks": {"w": object()}}, {"ends": len}, object()),
        mistake("another form", (), {}, None, 3.0, {"blocks": jnp.ones(3)}, legal=always),
    ]


def specs_of_shardings() -> list[Mistake]:
    """Mistakes in the specs of `shardings`, where branches may be left out, as in a part."""
    mistakes = but(specs_mistakes(), *_FINE_IN_SHARDINGS, "wrong type")
    return [*mistakes, wrong_type(lambda v: v is None or (isinstance(v, dict) and not v))]


# `shardings` takes a part of a tree too, and ignores entries that do not fit a leaf.
_FINE_IN_SHARDINGS = ("missing key", "too many entries", "wrong structure")


def blocks_mistakes() -> list[Mistake]:
    """Mistakes in the name of the layers' stack; no name is unknown, as no tree need have one."""
    return but(
        names((), extra=lambda v: isinstance(v, str)),
        *("unknown name", "odd characters", "very long text"),
    )


def rates_mistakes() -> list[Mistake]:
    """Mistakes in bytes a second."""
    return [
        wrong_type(lambda v: v is None or (isinstance(v, int | float) and v > 0)),
        mistake("zero", 0, 0.0),
        mistake("negative number", -1, -32e9),
        mistake("NaN", float("nan")),
        mistake("infinite", float("inf"), float("-inf")),
        mistake("bool for a number", True),
        mistake("text for a number", "32e9", "32GB/s"),
    ]


def choose_mistakes() -> dict[str, list[Mistake]]:
    """Mistakes in the arguments that `choose` alone has."""
    return {
        "memory": [
            wrong_type(lambda v: isinstance(v, int | float | np.number)),
            *memories(),
            mistake("another form", 0, "0", "1e3 MiB", float("inf"), np.float64(1e9), legal=always),
        ],
        "host_memory": [
            wrong_type(),
            *memories(),
            too_small_on_host(),
            mistake("another form", 0, "0", "1e3 MiB", float("inf"), np.float64(1e9), legal=always),
        ],
        "host_link": rates_mistakes(),
        "headroom": [
            *(m for m in amounts(most=1) if m.name not in ("infinite", "number far too large")),
            mistake("number far too large", 1, 1.0, 2, 1e300, float("inf")),
        ],
        "optimizer": [
            wrong_type(lambda v: v is None),
            mistake("class for an object", optax.GradientTransformation, optax.adam),
            mistake("another form", optax.adam(1e-3), None, legal=always),
        ],
        "schedules": [
            *names(dpj.schedules.names(), optional=True),
            mistake("unknown name", ("1f1b", "gpip"), ["all"], also=("schedule",)),
            mistake("empty", (), [], {}),
            mistake("number for a name", 3, (3,), ("1f1b", None), [b"1f1b"]),
            mistake(
                "another form",
                ("1f1b", "gpipe"),
                {"1f1b"},
                dict.fromkeys(["1f1b"]).keys(),
                legal=always,
            ),
        ],
        "remat": [
            *remat_mistakes()[:-1],
            mistake("empty", (), []),
            mistake("another form", ("none", "block"), ["block"], legal=always),
        ],
        "costs": [*of_type(dpj.Costs(), None), costs_of_kinds()],
        "trainable": mask_mistakes(),
    }
