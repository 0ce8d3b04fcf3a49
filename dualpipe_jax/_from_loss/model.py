"""`from_loss`: a model for the pipeline, from a loss function as one gives it to `jax.grad`."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax._errors import brief, raise_all, require_names, show
from dualpipe_jax._from_loss import functions, verify
from dualpipe_jax._from_loss.canonical import Conversion
from dualpipe_jax._from_loss.cut import Cut
from dualpipe_jax._from_loss.find import find_cut
from dualpipe_jax._from_loss.places import HOLE, Places, find_places
from dualpipe_jax._from_loss.report import show_cut
from dualpipe_jax._from_loss.terms import Term
from dualpipe_jax._model import call_checks, semantics
from dualpipe_jax._model.checks import positive_int
from dualpipe_jax._model.kinds import indices_in_stack, replicate_layers_dim
from dualpipe_jax._model.types import Batch, Context, Metrics, Model, Params, PyTree, Weight
from dualpipe_jax._model.users_call import call


def from_loss(
    loss_fn: Callable[..., Any],
    params: PyTree,
    microbatch: Batch,
    *,
    layers: str | Sequence[str],
    shared: str | Sequence[str] = (),
    rng: jax.Array | None = None,
    has_aux: bool = False,
    weight: Weight | None = None,
    max_kinds: int | None = None,
    max_x: int = 2,
) -> "LossModel":
    """Finds the pipeline in a loss function, whose model stays as it is.

    The loss is traced, not run, and cut between its layers where the fewest bytes cross. The model
    that comes out is taken by `value_and_grad`, `evaluate`, `sequential`, `memory` and `choose`;
    their functions take and return the user's own tree of parameters. The loss of a step is the
    mean over microbatches m of `loss_fn(params, microbatch_m, fold_in(rng, m))`.

    >>> import jax, jax.numpy as jnp, dualpipe_jax as dpj
    >>> def loss_fn(params, batch):
    ...     x = params["embed"][batch["tokens"]]
    ...     for i in range(4):
    ...         layer = params[f"layer_{i}"]
    ...         x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    ...     return jnp.square(x).mean()
    >>> layer = {"up": jnp.ones((3, 5)), "down": jnp.ones((5, 3))}
    >>> params = {"embed": jnp.ones((7, 3)), **{f"layer_{i}": layer for i in range(4)}}
    >>> batch = {"tokens": jnp.ones((4, 2), int)}
    >>> microbatch = {"tokens": jax.ShapeDtypeStruct((2, 2), batch["tokens"].dtype)}
    >>> model = dpj.from_loss(loss_fn, params, microbatch, layers="layer_{}")
    >>> mesh = jax.make_mesh((2,), ("pipe",), devices=jax.devices()[:2])
    >>> loss, grads = dpj.value_and_grad(model, mesh=mesh, num_microbatches=2)(params, batch)
    >>> jax.tree.structure(grads) == jax.tree.structure(params)
    True

    Args:
      loss_fn: `(params, microbatch) -> loss`, or with rng `(params, microbatch, rng) -> loss`; the
        loss is a floating-point scalar, or `(loss, metrics)` with has_aux.
      params: The parameters, any pytree: arrays, or `jax.ShapeDtypeStruct`s.
      microbatch: A microbatch, as the batch with `batch_size / num_microbatches` rows: arrays, or
        `jax.ShapeDtypeStruct`s. Other numbers of rows are found anew when they come.
      layers: The path of the layers in params, keys joined by "/": with "{}" for the number of
        layers of their own (`"params/layers_{}"`, `"blocks/{}"` for a list), without for a stack
        (leaves `[num_layers, ...]`). A sequence of paths for several groups, in the order in which
        they run: an encoder's and a decoder's.
      shared: Paths within `layers` whose parameters several layers use, such as a table in the
        first layer; parameters outside of the layers need no name here.
      rng: A key, if loss_fn takes one.
      has_aux: Whether loss_fn returns `(loss, metrics)`; metrics are summed over microbatches.
      weight: As `Model.weight`: the loss of a step is sum(loss_fn) / sum(weight).
      max_kinds: The most kinds of layers, each of which is a program of its own; None for half of
        the layers, but two to four.
      max_x: The largest part of x that layers make, as a multiple of the bytes that half of the
        layers read and write.

    Returns:
      A LossModel. `print` it to see which values cross between layers.

    Raises:
      ValueError: If an argument has a bad value, or if the loss has no pipeline: the message names
        the equation and its line in the user's model, and the cure. (docs/from_loss.md)
      TypeError: If an argument has a wrong type.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: must be a function, got {show(loss_fn)}")
    if weight is not None and not callable(weight):
        raise TypeError(f"weight: must be a function (microbatch) -> scalar, got {show(weight)}")
    if not isinstance(has_aux, bool):
        raise TypeError(f"has_aux={brief(has_aux)}: must be True or False")
    if max_kinds is not None:
        positive_int("max_kinds", max_kinds)
    positive_int("max_x", max_x)
    patterns = _require_paths("layers", layers)
    if not patterns:
        raise ValueError("layers=(): must name the layers, such as 'layers_{}'")
    raise_all(
        'layers: each path may have one "{}", for the number of the layer',
        (brief(pattern) for pattern in patterns if pattern.count(HOLE) > 1),
    )
    names = _require_paths("shared", shared)
    call_checks.arrays(semantics.pytree("params", params), "params")
    call_checks.arrays(semantics.pytree("microbatch", microbatch), "microbatch")
    _require_rows(microbatch)
    call_checks.key(rng)
    if weight is not None:
        jax.eval_shape(partial(call, "weight", "(microbatch) -> scalar", weight), microbatch)
    finder = Finder(
        loss_fn=loss_fn,
        places=find_places(semantics.as_arrays(params), patterns, names),
        has_aux=has_aux,
        is_weighted=weight is not None,
        max_kinds=max_kinds,
        max_x=max_x,
        has_key=rng is not None,
    )
    first = finder.cut(semantics.as_arrays(microbatch), rng)
    layout = first.layout
    blocks = {
        name: partial(_block, finder, number) for number, name in enumerate(dict.fromkeys(layout))
    }
    is_single = None in layout
    conversion = Conversion(places=finder.places, kinds=layout, shared=first.shared)
    if first.doubts:
        first.notes.append(
            verify.doubt(first, conversion, finder.loss, *finder.types_of(microbatch, rng))
        )
    return LossModel(
        embed=partial(_embed, finder),
        block=blocks[None] if is_single else blocks,  # pyrefly: ignore[bad-argument-type]
        head=partial(_head, finder),
        weight=weight,
        has_aux=has_aux,
        layout=None if is_single else layout,  # pyrefly: ignore[bad-argument-type]
        finder=finder,
        cut=first,
        conversion=conversion,
    )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LossModel(Model):
    """Describes the pipeline of a loss function as a `Model`; `from_loss` makes it."""

    finder: "Finder"
    cut: Cut
    conversion: Conversion

    def __str__(self) -> str:
        """Shows which values cross between layers, are made again, and are shared."""
        return show_cut(self.cut)

    def __repr__(self) -> str:
        """Names the layers."""
        return f"<dualpipe_jax.from_loss: {self.cut.num_layers} layers>"

    def verify(self, params: PyTree, microbatch: Batch, *, rng: jax.Array | None = None) -> float:
        """Compares loss and gradients with those of loss_fn, by running both on one microbatch.

        Args:
          params: The parameters, in the user's own tree.
          microbatch: A microbatch, arrays.
          rng: A key, if loss_fn takes one.

        Returns:
          The largest difference of the loss, or in a leaf of the gradients, over the largest entry
          of that leaf.

        Raises:
          ValueError: If an argument has another structure, or other shapes.
        """
        key = rng if self.finder.has_key else None
        if self.finder.has_key and key is None:
            raise ValueError("rng=None: loss_fn takes a key (from_loss was given one)")
        cut = self.finder.cut(microbatch, key)
        return verify.difference(cut, self.conversion, self.finder.loss, params, microbatch, key)

    def is_canonical(self, tree: PyTree) -> bool:
        """Whether a tree has the structure that `params` gives."""
        return jax.tree.structure(semantics.pytree("canonical", tree)) == self.conversion.structure

    def params(self, tree: PyTree) -> Params:
        """Converts a user's parameters to `{"ends": ..., "blocks": ...}`, `"shared"` if needed.

        Layers of their own are stacked, a copy; a stack of one kind stays as it is. Training can
        run on the converted parameters, which are sharded over the pipeline, and convert back at
        its end: give them, in place of the user's tree, to the functions of `value_and_grad`.

        Args:
          tree: A tree like that given to `from_loss`.

        Raises:
          ValueError: If it has another structure, or other shapes.
        """
        return self.conversion.params(tree)

    def tree(self, canonical: Params) -> PyTree:
        """Converts parameters, or gradients, in the form of `params` to the user's own tree.

        Args:
          canonical: `{"ends": ..., "blocks": ...}`, as `params` gives it.

        Raises:
          ValueError: If it is not of that form.
        """
        if not self.is_canonical(canonical):
            raise ValueError(
                f"canonical: must be as LossModel.params gives it, got {show(canonical)}"
            )
        return self.conversion.tree(canonical)

    def metrics(self, metrics: Any) -> PyTree:
        """Gives the metrics of a step the structure that loss_fn gave them.

        Args:
          metrics: The metrics of the head, or `Metrics`.
        """
        of_head = metrics.head if isinstance(metrics, Metrics) else metrics
        of_blocks = metrics.blocks if isinstance(metrics, Metrics) else {}
        of_blocks = replicate_layers_dim(of_blocks)
        layout, terms = self.cut.layout, self.cut.terms
        indices = indices_in_stack(layout)
        rows: dict[int, dict[Any, Any]] = defaultdict(dict)

        def add(term: Term, value: Any) -> None:
            for leaf, row in term.places:
                of_leaf = rows[leaf]
                of_leaf[row] = of_leaf[row] + value if row in of_leaf else value

        of_head = of_head or ()
        for term, value in zip((t for t in terms.of_head if not t.is_loss), of_head, strict=True):
            add(term, value)
        for layer, of_layer in enumerate(terms.of_layers):
            stacks = of_blocks if None in layout else of_blocks.get(layout[layer])
            for number, term in enumerate(t for t in of_layer if not t.is_loss):
                add(term, stacks[number][indices[layer]])
        leaves = []
        for leaf, output in enumerate(self.cut.outputs[1:]):
            of_leaf = rows[leaf]
            whole = (
                of_leaf[None]
                if None in of_leaf
                else jnp.stack([of_leaf[i] for i in sorted(of_leaf)])
            )
            leaves.append(whole.astype(semantics.accumulator_dtype(output.aval.dtype)))
        # The first leaf of the structure is the loss.
        return jax.tree.unflatten(self.cut.structure, [None, *leaves])[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Finder:
    """Finds the pipeline of a loss for the shapes of a microbatch, once for each.

    Attributes:
      loss_fn: The loss.
      places: The places of the parameters.
      has_aux: Whether it returns metrics.
      is_weighted: Whether the loss is divided by a weight.
      max_kinds: The most kinds of layers.
      max_x: The largest x.
      has_key: Whether loss_fn takes a key.
    """

    loss_fn: Callable[..., Any]
    places: Places
    has_aux: bool
    is_weighted: bool
    max_kinds: int | None
    max_x: int
    has_key: bool
    _cuts: dict[Hashable, Cut] = field(default_factory=dict, init=False)

    def types_of(self, microbatch: Batch, key: Any) -> tuple[Any, Any]:
        """Gives the types of a microbatch and a key; None for a key that loss_fn does not take."""
        return jax.tree.map(_type_of, (microbatch, key if self.has_key else None))

    def loss(self, params: PyTree, microbatch: Batch, key: Any) -> Any:
        """Computes the loss as the user wrote it, without its metrics."""
        out = self.loss_fn(params, microbatch, *([key] if self.has_key else []))
        return out[0] if self.has_aux else out

    def cut(self, microbatch: Batch, key: Any) -> Cut:
        """Finds the pipeline for a microbatch and a key, of which only the types count.

        Raises:
          ValueError: If there is none, or another one than for the first microbatch.
        """
        shapes, key = self.types_of(microbatch, key)
        leaves, structure = jax.tree.flatten((shapes, key))
        at = (
            structure,
            tuple((leaf.shape, leaf.dtype) for leaf in leaves),
            jax.sharding.get_abstract_mesh(),
        )
        if at not in self._cuts:
            must = "(params, microbatch, rng)" if self.has_key else "(params, microbatch)"
            found = find_cut(
                partial(call, "loss_fn", f"{must} -> loss", self.loss_fn),
                self.places,
                shapes,
                key,
                has_aux=self.has_aux,
                is_weighted=self.is_weighted,
                max_kinds=self.max_kinds,
                max_x=self.max_x,
            )
            first = next(iter(self._cuts.values()), found)
            if _form(found) != _form(first):
                raise ValueError(
                    "batch: with microbatches of these shapes the loss has another pipeline than "
                    "with the microbatch given to from_loss; make the model of a microbatch like "
                    "these"
                )
            if found.has_tracers:  # of the trace around it, which ends
                return found
            self._cuts[at] = found
        return self._cuts[at]


def _form(cut: Cut) -> Any:
    """Gives the part of a pipeline that parameters and results depend on."""
    metrics = [
        [term.places for term in terms if not term.is_loss]
        for terms in (*cut.terms.of_layers, cut.terms.of_head)
    ]
    return cut.layout, cut.shared, metrics, cut.structure


def _embed(finder: Finder, ends: PyTree, ctx: Context) -> Any:
    return functions.embed(_cut_of(finder, ctx), ends, ctx)


def _block(finder: Finder, number: int, params: PyTree, x: PyTree, ctx: Context) -> Any:
    return functions.block(_cut_of(finder, ctx), number, params, x, ctx)


def _head(finder: Finder, ends: PyTree, x: PyTree, ctx: Context) -> Any:
    return functions.head(_cut_of(finder, ctx), ends, x, ctx, has_aux=finder.has_aux)


def _cut_of(finder: Finder, ctx: Context) -> Cut:
    if finder.has_key and ctx.microbatch_rng is None:
        raise ValueError(
            "rng=None: loss_fn takes a key (from_loss was given one), so that each call must be "
            "given one too: rng=jax.random.key(0), say, and another key in every step"
        )
    return finder.cut(ctx.microbatch, ctx.microbatch_rng)


def _type_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _require_paths(argument: str, value: Any) -> tuple[str, ...]:
    """Requires a path, or a sequence of them."""
    paths = require_names(argument, value)
    raise_all(
        f"{argument}: must be paths, keys joined by '/'",
        (brief(path) for path in paths if not path or path.startswith("/") or path.endswith("/")),
    )
    return paths


def _require_rows(microbatch: Batch) -> None:
    """Requires one leading dim of all leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(microbatch)
    if not leaves:
        raise ValueError("microbatch: must hold at least one array [rows, ...]; got none")
    shapes = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
    raise_all(
        "microbatch: all leaves must share their leading dim, the rows of a microbatch",
        (f"microbatch{path} of shape {shape}" for path, shape in shapes.items())
        if len({shape[:1] for shape in shapes.values()} - {()}) != 1 or () in shapes.values()
        else (),
    )
