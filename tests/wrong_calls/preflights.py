"""Programs for absent hardware: `preflight` and `compiler_options`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

import dualpipe_jax as dpj
from tests.wrong_calls import users
from tests.wrong_calls.arguments import rates_mistakes
from tests.wrong_calls.mistakes import (
    Mistake,
    always,
    left_out,
    memories,
    mistake,
    names,
    too_small_on_host,
    wrong_type,
)
from tests.wrong_calls.oracle import Target


def _is_cost(entry: tuple[Any, Any]) -> bool:
    """Whether an entry of `kernel_costs` is the FLOPs of a kernel by its name."""
    name, flops = entry
    return isinstance(name, str) and isinstance(flops, int | float) and flops >= 0


def _step(x: Any) -> Any:
    return x * 2


_MESH = users.make_mesh(2, 2)


def _on(mesh: Any) -> Any:
    return jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jax.NamedSharding(mesh, P("pipe")))


def _mistakes() -> dict[str, list[Mistake]]:
    x, other = _on(_MESH), _on(users.make_mesh(2))
    return {
        "step_fn": [
            wrong_type(callable),
            left_out(),
            mistake("function of other arguments", lambda: 0, lambda a, b: a),
        ],
        "args": [
            wrong_type(lambda v: isinstance(v, tuple | list)),
            left_out(),
            mistake("no mesh", (np.ones(2),), (), also=("mesh",)),
            mistake("two meshes", (x, other)),
            mistake("text for a leaf", ("text",), (x, "text"), ({"a": "text"},)),
            mistake("object for a leaf", (object(),), (x, len), (np.array([None]),)),
        ],
        "topology": [
            *names(("cpu:4",)),
            left_out(),
            mistake(
                "unknown name",
                "tpu",
                "tpu:v4:2x4",
                "gpu:a100:8",
                "cpu",
                "cpu:",
                "cpu:-4",
                "cpu:4:4",
                "tpu:v5e:2x4x4x4",
                "tpu:v5e:0x4",
                "tpu:v5e:x",
                "tpu:v5e:2x2*0",
                "tpu:v5e:2x2*",
            ),
            mistake(
                "number far too large",
                "cpu:99999",
                "tpu:v5e:99999x99999",
                "tpu:v5e:2x2*99999",
                "gpu:h100:9",
                "cpu:" + "9" * 400,
                "cpu:1000",
            ),
            mistake("mesh of another size", "cpu:3", "cpu:5"),
        ],
        "compiler_options": [
            wrong_type(
                lambda v: v is None or (isinstance(v, dict) and all(map(_is_cost, v.items())))
            ),
            mistake("unknown name", {"xla_no_such": 1}, {"": 1}, {"x\n": "y"}),
            mistake("number for a name", {3: 1}, {None: True}),
            mistake(
                "object for a leaf",
                {"xla_cpu_enable_fast_math": object()},
                {"xla_cpu_enable_fast_math": [1]},
            ),
            mistake("text for a bool", {"xla_cpu_enable_fast_math": "perhaps"}),
        ],
        "mesh": [
            wrong_type(lambda v: v is None),
            mistake("shape for a mesh", (2, 2), {"pipe": 2}),
            mistake(
                "mesh of another size",
                users.make_mesh(8),
                users.make_mesh(2),
                also=("topology",),
            ),
        ],
        "kernel_costs": [
            wrong_type(
                lambda v: v is None or (isinstance(v, dict) and all(map(_is_cost, v.items())))
            ),
            mistake("number for a name", {3: 1}, {None: 1.0}),
            mistake("text for a number", {"kernel": "1"}, {"kernel": ""}),
            mistake(
                "negative number",
                {"kernel": -1},
                {"kernel": float("nan")},
                {"kernel": 10**400},
            ),
            mistake("bool for a number", {"kernel": True}),
        ],
        "host_link": rates_mistakes(),
        "dcn": rates_mistakes(),
        "host_memory": [
            wrong_type(lambda v: v is None),
            *memories(),
            too_small_on_host(),
            mistake("another form", 0, "0", "1e3 MiB", float("inf"), np.float64(1e9), legal=always),
        ],
    }


def targets() -> list[Target]:
    """Lists the callables that compile for absent hardware."""
    return [
        Target(
            name="preflight",
            call=dpj.preflight,
            valid={"step_fn": _step, "args": (_on(_MESH),), "topology": "cpu:4"},
            mistakes=_mistakes(),
            raises=(ValueError, TypeError, ModuleNotFoundError),
            weight=2,
        ),
        Target(
            name="compiler_options",
            call=dpj.compiler_options,
            valid={"platform": "cpu"},
            mistakes={"platform": [*names(("tpu", "gpu", "cpu")), left_out()]},
        ),
    ]
