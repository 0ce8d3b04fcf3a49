"""A published model as a pipeline: its loss, LoRA's parameters beside its own, and the merge.

The loss is the model's own forward and the cross entropy of the next token; `dpj.from_loss` finds
the pipeline in it. Parameters have the form of the pipeline, `{"ends": .., "blocks": ..}`, with the
leaves by their paths in the model.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import dualpipe_jax as dpj
from experiments.finetune.families import Published
from experiments.train_lm.trainer.mesh import PIPE, unsharded, with_fsdp

# The matrices of attention and MLP in tunix's models, by the modules that hold them.
ADAPTED = r".*/(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|[a-z_]*einsum)"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The size of the adapters: the change of a matrix is `alpha / rank` times A x B."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """The factor of A x B."""
        return self.alpha / self.rank


class Model:
    """A published model as a pipeline.

    Attributes:
      published: The model.
      lora: The adapters; None to train all parameters.
      pipelined: The `dpj.Model`.
      shapes: The shapes of all parameters, in the form of the pipeline.
    """

    def __init__(
        self, published: Published, *, dtype: Any, lora: Lora | None, rows: int, length: int
    ):
        """Traces the model, without arrays.

        Args:
          published: The model.
          dtype: That of parameters and compute.
          lora: The adapters; None to train all parameters.
          rows: Windows of a microbatch on each shard.
          length: Tokens of a window, the last one among them.
        """
        self.published, self.lora = published, lora
        net = nnx.eval_shape(self._make(dtype))
        self._graph, state = nnx.split(net)
        self._tree = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), nnx.to_pure_dict(state)
        )
        self._merges = _merges_of(net.layers[0])
        microbatch = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        self.pipelined = dpj.from_loss(self.loss, self._tree, microbatch, layers="layers/{}")
        self.shapes = jax.eval_shape(self.pipelined.params, self._tree)

    def loss(self, tree: Any, tokens: jax.Array) -> jax.Array:
        """Gives the mean loss in nats a token, float32[].

        Args:
          tree: The parameters of tunix's model, a pure dict.
          tokens: int32[rows, context + 1].
        """
        logits = self.logits(tree, tokens[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def logits(self, tree: Any, tokens: jax.Array) -> jax.Array:
        """Gives the model's logits, [rows, length, vocabulary], for int32[rows, length]."""
        rows, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length))
        with self.published.rope():
            return nnx.merge(self._graph, tree)(tokens, positions, None, mask)[0]

    def is_trained(self, tree: Any) -> Any:
        """Says for each parameter of tunix's tree whether it is trained."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: self.lora is None or is_adapter(str(path[-1].key)), tree
        )

    def specs(self, mesh: Mesh) -> Any:
        """Gives the specs of all parameters, in the form of the pipeline.

        Layers are sharded over the ranks without being named here. Outside of them a matrix is
        sharded over the ranks too, in its largest dim that they divide, and each parameter over
        the axis of FSDP.
        """
        specs = with_fsdp(unsharded(self.shapes), self.shapes, mesh)
        ranks = mesh.shape[PIPE]

        def add(leaf: Any, spec: Any) -> Any:
            entries = [*spec, *[None] * (leaf.ndim - len(spec))]
            free = [
                dim
                for dim in range(leaf.ndim)
                if entries[dim] is None and leaf.shape[dim] % ranks == 0
            ]
            if not free or leaf.ndim < 2:
                return spec
            entries[max(free, key=lambda dim: leaf.shape[dim])] = PIPE
            return jax.P(*entries)

        return specs | {"ends": jax.tree.map(add, self.shapes["ends"], specs["ends"])}

    def placed(self, mesh: Mesh, shapes: Any, specs: Any) -> Any:
        """Gives shapes their shardings: those of all parameters, or of a part as `split` gives."""
        where = dpj.shardings(shapes, mesh=mesh, axis=PIPE, param_specs=specs)
        return jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            shapes,
            where,
        )

    def to_tree(self, specs: Any) -> Any:
        """Gives specs in the form of the pipeline that of tunix's tree, which `dpj` takes."""

        def of(path: Any, leaf: Any) -> Any:
            keys = [str(key.key) for key in path]
            if keys[0] != "layers":
                return specs["ends"]["/".join(keys)]
            return jax.P(*specs["blocks"]["/".join(keys[2:])][1:])

        return jax.tree_util.tree_map_with_path(of, self._tree)

    def split(self, params: Any) -> tuple[Any, Any]:
        """Splits parameters, or trees like them, into trained and frozen ones."""
        if self.lora is None:
            return params, {}
        blocks = params["blocks"]
        trained = {name: leaf for name, leaf in blocks.items() if is_adapter(name)}
        frozen = {name: leaf for name, leaf in blocks.items() if not is_adapter(name)}
        return {"blocks": trained}, {"ends": params["ends"], "blocks": frozen}

    @property
    def own(self) -> Any:
        """The shapes of the model's own parameters, without adapters."""
        if self.lora is None:
            return self.shapes
        return self.split(self.shapes)[1]

    def join(self, trained: Any, frozen: Any = None) -> Any:
        """Joins trained and frozen parameters."""
        if self.lora is None:
            return trained
        return {"ends": frozen["ends"], "blocks": frozen["blocks"] | trained["blocks"]}

    def init(self, key: jax.Array) -> Any:
        """Makes the trained parameters: with LoRA as qwix does, A at random and B zero."""
        shapes, _ = self.split(self.shapes)
        if self.lora is None:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        he_uniform = jax.nn.initializers.he_uniform()
        made = {}
        for number, (name, leaf) in enumerate(sorted(shapes["blocks"].items())):
            layers, *shape = leaf.shape
            made[name] = jnp.zeros(leaf.shape, leaf.dtype)
            if name.endswith("_a"):
                keys = jax.random.split(jax.random.fold_in(key, number), layers)
                init = functools.partial(he_uniform, shape=tuple(shape), dtype=leaf.dtype)
                made[name] = jax.vmap(init)(keys)
        return {"blocks": made}

    def merge(self, path: str, matrix: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Adds to a layer's matrix the change that its adapter A, B has learnt, in float32.

        Args:
          path: Of the matrix in its layer.
          matrix: The matrix, of whatever shape tunix gives it.
          a: Its dims that are summed over, then the rank.
          b: The rank, then the other dims.
        """
        assert self.lora is not None
        a, b = (part.astype(np.float32) for part in (a, b))
        change = np.einsum(self._merges[path], a, b, optimize=True)
        return matrix.astype(np.float32) + np.float32(self.lora.scale) * change

    def flops_per_token(self, context: int) -> float:
        """Counts forward and backward; frozen matrices have no weight grad."""
        sizes = [
            sum(leaf.size for leaf in jax.tree.leaves(part)) for part in self.split(self.shapes)
        ]
        width = next(iter(self.shapes["ends"].values())).shape[-1]
        attention = 12 * self.published.num_layers * width * context
        return 6 * sizes[0] + 4 * sizes[1] + attention

    def _make(self, dtype: Any) -> Any:
        def make() -> Any:
            net = self.published.make(dtype)
            if self.lora is None:
                return net
            import qwix

            provider = qwix.LoraProvider(
                module_path=ADAPTED, rank=self.lora.rank, alpha=self.lora.alpha
            )
            one = jnp.ones((1, 1), jnp.int32)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                return qwix.apply_lora_to_model(
                    net, provider, one, one, None, jnp.ones((1, 1, 1), bool), rngs=nnx.Rngs(0)
                )

        return make


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of LoRA's, by its name or path."""
    return name.endswith(("_lora_a", "_lora_b"))


def _merges_of(layer: Any) -> dict[str, str]:
    """Finds the matrices of a layer that have adapters, and the einsum of A and B for each."""
    merges = {}
    for path, module in nnx.iter_graph(layer):
        for name in vars(module) if isinstance(module, nnx.Module) else ():
            if not name.endswith("_lora_a"):
                continue
            matrix = name.removesuffix("_lora_a")
            if whole := getattr(module, f"{matrix}_lora_einsum_str", None):
                _, a, b = whole.split("->")[0].split(",")
                own = module.einsum_str.split("->")[0].split(",")[1]
                einsum = f"{a},{b}->{own}"
            else:
                einsum = "ir,ro->io"
            merges["/".join((*map(str, path), matrix))] = einsum
    return merges
