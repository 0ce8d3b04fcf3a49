"""Steps of a model: `value_and_grad`, `evaluate`, `apply`, `sequential`, `choose`, `shardings`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import dualpipe_jax as dpj
from tests.wrong_calls import arguments as of
from tests.wrong_calls import model_fields as fields
from tests.wrong_calls import tensors, users
from tests.wrong_calls.mistakes import Mistake, but, mistake
from tests.wrong_calls.oracle import Target
from tests.wrong_calls.users import BATCH, MESH, MODEL, PARAMS

_CALL = ("params", "batch", "rng", "loss_scale")


def _is_traced(leaf: Any) -> bool:
    is_number = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc"
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or is_number


def under_trace(function: Callable[..., Any], **arguments: Any) -> Any:
    """Calls a function as a user's jit does; values that are no arrays go in as they are."""
    flat = {name: _flatten(value) for name, value in arguments.items()}
    traced = {
        (name, i): leaf
        for name, (leaves, _) in flat.items()
        for i, leaf in enumerate(leaves)
        if _is_traced(leaf)
    }

    def run(arrays: list[Any]) -> Any:
        given = dict(zip(traced, arrays, strict=True))
        return function(
            **{
                name: leaves[0]
                if structure is None
                else structure.unflatten(
                    given.get((name, i), leaf) for i, leaf in enumerate(leaves)
                )
                for name, (leaves, structure) in flat.items()
            }
        )

    return jax.eval_shape(run, list(traced.values()))


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    """Gives the leaves and the structure of a tree; without a structure if JAX cannot sort it."""
    try:
        return jax.tree.flatten(tree)
    except ValueError:
        return [tree], None


def made_and_called(make: Callable[..., Any]) -> Callable[..., Any]:
    """Makes one call of two: of the public function, and of the function that it returns."""

    def call(**arguments: Any) -> Any:
        options = {name: value for name, value in arguments.items() if name not in _CALL}
        function = make(**options)
        return under_trace(function, **{n: v for n, v in arguments.items() if n in _CALL})

    return call


def called_directly(**arguments: Any) -> Any:
    """Calls the function of `value_and_grad` with values, as outside of any jit."""
    grad_fn = dpj.value_and_grad(MODEL, mesh=MESH, num_microbatches=2)
    return jax.eval_shape(lambda: grad_fn(**arguments))  # nothing is compiled


def memory(**arguments: Any) -> Any:
    grad_fn = dpj.value_and_grad(MODEL, mesh=MESH, num_microbatches=2)
    return grad_fn.memory(**arguments)


def call_model(params: Any) -> Callable[..., Any]:
    """Makes the call that makes a model, and traces it with a pipeline and without."""

    def call(**fields: Any) -> Any:
        model = dpj.Model(**fields)
        for function in (
            dpj.sequential(model, num_microbatches=2),
            dpj.value_and_grad(model, mesh=MESH, num_microbatches=2),
        ):
            under_trace(function, params=params, batch=BATCH)

    return call


def call_with_aux(**fields: Any) -> Any:
    """Traces a model whose block returns an Aux."""

    def block(params: Any, x: Any, ctx: dpj.Context) -> Any:
        return users.block(params, x, ctx), dpj.Aux(**fields)

    call_model(PARAMS)(**{**users.FUNCTIONS, "block": block})


def _called(**more: list[Mistake]) -> dict[str, list[Mistake]]:
    return {
        "params": tensors.params_mistakes(),
        "batch": tensors.batch_mistakes(),
        "rng": tensors.rng_mistakes(),
        **more,
    }


_VALID = {"model": MODEL, "mesh": MESH, "num_microbatches": 2, "params": PARAMS, "batch": BATCH}


def _made() -> dict[str, list[Mistake]]:
    """Mistakes in the arguments that all kinds of steps have."""
    data = ("data", ("data",), ["data"], (), [])
    return {
        "model": of.model_mistakes(),
        "mesh": of.mesh_mistakes(),
        "num_microbatches": of.count_mistakes(),
        "axis": of.axis_mistakes(),
        "batch_axes": of.axes_mistakes(data),
        "manual_axes": of.axes_mistakes(data),
        "param_specs": of.specs_mistakes(),
        "layers_per_stage": of.sizes_mistakes(),
    }


def _avals() -> list[Mistake]:
    """Avals for arrays, which no call can run on."""
    avals = jax.eval_shape(lambda: PARAMS)
    return [mistake("aval for an array", avals, {**PARAMS, "ends": avals["ends"]})]


def _training() -> list[Target]:
    of_training = {
        "grad_specs": of.specs_mistakes(),
        "schedule": of.schedule_mistakes(),
        "remat": of.remat_mistakes(),
        "grad_dtype": of.dtype_mistakes(),
        "trainable": of.mask_mistakes(),
        "overwrite": of.mask_mistakes(),
        "execution": of.of_type(dpj.Execution(), dpj.Execution(overlap=False)),
        "costs": [*of.of_type(dpj.Costs(), None), of.costs_of_kinds()],
    }
    called = _called(loss_scale=tensors.scale_mistakes())
    plain = {"params": PARAMS, "batch": BATCH}
    return [
        Target(
            name="value_and_grad",
            call=made_and_called(dpj.value_and_grad),
            valid=_VALID,
            mistakes={**_made(), **of_training},
            weight=6,
        ),
        Target(
            name="grad_fn",
            call=made_and_called(dpj.value_and_grad),
            valid=_VALID,
            mistakes=called,
            weight=4,
        ),
        Target(
            name="grad_fn outside of jit",
            call=called_directly,
            valid=plain,
            mistakes={**called, "params": _avals() + called["params"]},
            weight=2,
        ),
        Target(name="grad_fn.memory", call=memory, valid=plain, mistakes=_called(), weight=2),
    ]


def _forwards() -> list[Target]:
    made = _made()
    return [
        Target(
            name="evaluate",
            call=made_and_called(dpj.evaluate),
            valid=_VALID,
            mistakes={**made, **_called()},
            weight=3,
        ),
        Target(
            name="apply",
            call=made_and_called(dpj.apply),
            valid={**_VALID, "output": users.errors_of_rows},
            # Outputs may be complex, and of any shape after the rows.
            mistakes={
                **made,
                **_called(),
                "batch": but(tensors.batch_mistakes(), "wrong dtype"),
                "output": of.output_mistakes(),
            },
            weight=3,
        ),
        Target(
            name="sequential",
            call=made_and_called(dpj.sequential),
            valid=users.without(_VALID, "mesh"),
            mistakes={
                "model": made["model"],
                "num_microbatches": made["num_microbatches"],
                "overwrite": of.mask_mistakes(),
                **_called(),
                "params": but(tensors.params_mistakes(), "fewer layers than stages"),
            },
            weight=4,
        ),
    ]


def targets() -> list[Target]:
    """Lists the callables of a model's steps."""
    made = _made()
    return [
        *_training(),
        *_forwards(),
        Target(
            name="Model",
            call=call_model(PARAMS),
            valid=users.FUNCTIONS,
            mistakes=fields.model_fields(users.FUNCTIONS),
            weight=3,
        ),
        Target(
            name="Model with kinds",
            call=call_model(users.PARAMS_OF_KINDS),
            valid=users.KINDS,
            mistakes=fields.model_fields(users.KINDS),
            weight=3,
        ),
        Target(name="Aux", call=call_with_aux, valid={}, mistakes=fields.aux_mistakes(), weight=1),
        Target(
            name="shardings",
            call=dpj.shardings,
            valid={"tree": PARAMS, "mesh": MESH},
            mistakes={
                # A mesh that does not divide the layers replicates them.
                "mesh": but(made["mesh"], "mesh of another size"),
                "axis": made["axis"],
                "tree": of.tree_mistakes(),
                "param_specs": of.specs_of_shardings(),
                "blocks": of.blocks_mistakes(),
            },
            weight=2,
        ),
        Target(
            name="choose",
            call=dpj.choose,
            valid={**_VALID, "schedules": "1f1b", "remat": "none", "host_link": 32e9},
            mistakes={**made, **_called(), **of.choose_mistakes()},
            weight=3,
        ),
    ]
