"""A folder's safetensors -> the leaves of the model, on the devices that hold them; and back.

A leaf of the pipeline's parameters is read by the callback of `jax.make_array_from_callback`: each
process opens only the tensors of layers that its own devices hold, one tensor at a time. Which
tensor becomes which leaf is found in the table of tunix's loader; its inverse writes the folder.
"""

import importlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from experiments.finetune.families import Published
from experiments.train_lm.flags import Refusal
from experiments.train_lm.trainer import processes
from experiments.train_lm.trainer.mesh import PIPE

# Takes a path, a matrix, and the A and B of its adapter; gives the merged matrix.
Merge = Callable[[str, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
INDEX = "model.safetensors.index.json"
# A leaf: its layer (None outside of the layers), and its path.
Leaf = tuple[int | None, str]
Index = tuple[slice, ...]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Says how a tensor becomes a leaf, or an entry of one.

    Attributes:
      name: In the folder.
      leaf: The leaf.
      entry: Its entry in the leaf's first dim; None if it is the leaf.
      permuted: The order of the tensor's dims before it is reshaped.
      shape: The shape after that; None leaves it.
      ordered: The order of the dims after that.
    """

    name: str
    leaf: Leaf
    entry: int | None = None
    permuted: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    ordered: tuple[int, ...] | None = None

    def part(self, index: Index) -> Index | None:
        """Finds the part of the tensor that makes a part of its leaf; None if it is no box."""
        if self.shape is not None or self.entry is not None:
            return None
        if self.permuted is None:
            return index
        return tuple(index[self.permuted.index(dim)] for dim in range(len(index)))

    def to_leaf(self, value: np.ndarray) -> np.ndarray:
        """Converts the tensor's value."""
        value = value if self.permuted is None else value.transpose(self.permuted)
        value = value if self.shape is None else value.reshape(self.shape)
        return value if self.ordered is None else value.transpose(self.ordered)

    def from_leaf(self, value: np.ndarray, stored: tuple[int, ...]) -> np.ndarray:
        """Converts a leaf's value, or its entry's, back; `stored` is the tensor's shape."""
        value = value if self.entry is None else value[self.entry]
        value = value if self.ordered is None else value.transpose(np.argsort(self.ordered))
        if self.permuted is None:
            return value.reshape(stored)
        return value.reshape([stored[dim] for dim in self.permuted]).transpose(
            np.argsort(self.permuted)
        )


class Folder:
    """The tensors of a folder: which file has each one, and its shape and dtype, by name."""

    def __init__(self, path: Path):
        """Reads the headers of the files.

        Raises:
          Refusal: If there are none, or if they are not those of the index.
        """
        self.path = path
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise Refusal(f"--model {path}: has no *.safetensors")
        self.files: dict[str, Path] = {}
        self.headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in files:
            try:
                with safetensors.safe_open(file, framework="numpy") as opened:
                    for name in opened.keys():  # noqa: SIM118  it is no dict
                        part = opened.get_slice(name)
                        self.files[name] = file
                        self.headers[name] = tuple(part.get_shape()), part.get_dtype()
            except (OSError, safetensors.SafetensorError) as error:
                raise Refusal(f"--model {path}: {file.name}: {error}") from error
        self._require_index()

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads a tensor, or a part of it."""
        with safetensors.safe_open(self.files[name], framework="numpy") as opened:
            return opened.get_tensor(name) if index is None else opened.get_slice(name)[index]

    def _require_index(self) -> None:
        path = self.path / INDEX
        if not path.exists():
            return
        try:
            named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            missing = sorted(
                name
                for name, file in named.items()
                if name not in self.files or self.files[name].name != file
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise Refusal(f"--model {self.path}: {INDEX}: {error}") from error
        if missing:
            raise Refusal(
                f"--model {self.path}: {INDEX} has {len(missing)} tensors that are not in their "
                f"files, {missing[0]} among them"
            )


class Weights:
    """The weights of a published model, by the leaves of the pipeline's parameters."""

    def __init__(self, folder: Folder, published: Published, params: Any):
        """Finds the tensors of every leaf.

        Args:
          folder: The folder.
          published: Its model.
          params: The shapes of the parameters in the form of the pipeline, without adapters.

        Raises:
          Refusal: If a leaf has no tensor, or one of another shape.
        """
        self.folder = folder
        found = _find(folder, published, params)
        self._tensors = {tensor.name: tensor for tensors in found.values() for tensor in tensors}
        if published.is_tied and "lm_head.weight" in folder.files:
            embedding = found[None, _EMBEDDING][0]
            self._tensors["lm_head.weight"] = Tensor(name="lm_head.weight", leaf=embedding.leaf)
        self._found = found
        self._num_layers = published.num_layers
        self._require(params)

    @property
    def unknown(self) -> list[str]:
        """The tensors that the model has no place for; they are written as they were read."""
        return sorted(self.folder.files.keys() - self._tensors.keys())

    def load(self, shapes: Any) -> Any:
        """Reads parameters, each process those of its devices.

        Args:
          shapes: `jax.ShapeDtypeStruct`s with shardings, in the form of the pipeline.
        """
        return {
            part: {
                name: jax.make_array_from_callback(
                    aval.shape, aval.sharding, self._reader(part, name, aval)
                )
                for name, aval in leaves.items()
            }
            for part, leaves in shapes.items()
        }

    def save(self, path: Path, params: Any, *, mesh: Any, merge: Merge) -> None:
        """Writes a folder with the files, tensors and dtypes of the one that was read.

        All processes call it. File i is written by process i modulo their number, which holds the
        tensors of that file; other processes hold one layer's tensor at a time.

        Args:
          path: The new folder; it has its name when it is complete.
          params: In the form of the pipeline: the leaves that `load` gives, and adapters of LoRA.
          mesh: The devices.
          merge: Gives the new value of a layer's matrix, from its path, its value, A and B.
        """
        part = path.with_name(f"{path.name}.part")
        if processes.is_first():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for file in self.folder.path.iterdir():
                if file.is_file() and file.suffix != ".safetensors":
                    shutil.copyfile(file, part / file.name)
        processes.wait_for_all("folder of the model")
        fetch = _Fetch(mesh)
        files = sorted(set(self.folder.files.values()))
        for number, file in enumerate(files):
            is_mine = number % jax.process_count() == jax.process_index()
            values = {}
            for name in sorted(n for n, at in self.folder.files.items() if at == file):
                tensor = self._tensors.get(name)
                value = None if tensor is None else _value(tensor.leaf, params, fetch, merge)
                if is_mine:
                    values[name] = self._tensor(name, value)
            if is_mine:
                with safetensors.safe_open(file, framework="numpy") as opened:
                    metadata = opened.metadata()
                safetensors.numpy.save_file(values, part / file.name, metadata=metadata)
        processes.wait_for_all("files of the model")
        if processes.is_first():
            if path.exists():
                shutil.rmtree(path)
            part.rename(path)
        processes.wait_for_all("model")

    def _reader(self, part: str, name: str, aval: Any) -> Any:
        def read(index: Index) -> np.ndarray:
            if part != "blocks":
                return self._read((None, name), index, aval.dtype)
            layers = range(*index[0].indices(aval.shape[0]))
            return np.stack([self._read((n, name), index[1:], aval.dtype) for n in layers])

        return read

    def _read(self, leaf: Leaf, index: Index, dtype: Any) -> np.ndarray:
        tensors = self._found[leaf]
        first = tensors[0]
        if (part := first.part(index)) is not None:
            value = first.to_leaf(self.folder.read(first.name, part))
        elif first.entry is None:
            value = first.to_leaf(self.folder.read(first.name))[index]
        else:
            parts = [tensor.to_leaf(self.folder.read(tensor.name)) for tensor in tensors]
            value = np.stack(parts)[index]
        return np.ascontiguousarray(value.astype(dtype))

    def _tensor(self, name: str, value: np.ndarray | None) -> np.ndarray:
        """Gives a tensor of a leaf's value; the tensor that was read if there is none."""
        if value is None:
            return self.folder.read(name)
        dtype = self.folder.read(name, (slice(0, 0),)).dtype
        value = self._tensors[name].from_leaf(value, self.folder.headers[name][0])
        return np.ascontiguousarray(value.astype(dtype))

    def _require(self, params: Any) -> None:
        shapes = {(None, path): leaf.shape for path, leaf in params["ends"].items()}
        for path, leaf in params["blocks"].items():
            shapes |= {(layer, path): leaf.shape[1:] for layer in range(self._num_layers)}
        missing = [_show(leaf) for leaf in shapes if leaf not in self._found]
        if missing:
            raise Refusal(
                f"--model {self.folder.path}: has no tensors for {len(missing)} parameters, "
                f"{missing[0]} among them"
            )
        for leaf, shape in shapes.items():
            tensors = self._found[leaf]
            for tensor in tensors:
                stored = self.folder.headers[tensor.name][0]
                wanted = shape if tensor.entry is None else shape[1:]
                count = shape[0] if tensor.entry is not None else 1
                if _shape_of(tensor, stored) != wanted or len(tensors) != count:
                    raise Refusal(
                        f"--model {self.folder.path}: {tensor.name} of shape {list(stored)} does "
                        f"not make {_show(leaf)} of shape {list(shape)}, which config.json asks for"
                    )


def _value(leaf: Leaf, params: Any, fetch: "_Fetch", merge: Merge) -> np.ndarray:
    """Fetches a leaf, or a layer of it, with the change of its adapter; all processes together."""
    layer, path = leaf
    if layer is None:
        return fetch(params["ends"][path], None)
    blocks = params["blocks"]
    value = fetch(blocks[path], layer)
    adapter = [f"{path}_lora_{part}" for part in "ab"]
    if adapter[0] not in blocks:
        return value
    return merge(path, value, *(fetch(blocks[name], layer) for name in adapter))


class _Fetch:
    """Fetches a leaf, or a layer of a stack, to every process: its bits."""

    def __init__(self, mesh: Any):
        self._mesh = mesh
        self._whole = jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._layer = jax.jit(self._of_stack, static_argnames="spec")

    def __call__(self, leaf: jax.Array, layer: int | None) -> np.ndarray:
        if layer is not None:
            assert isinstance(leaf.sharding, NamedSharding)
            leaf = self._layer(leaf, np.int32(layer), spec=leaf.sharding.spec)
        return np.asarray(self._whole(leaf).addressable_data(0))

    def _of_stack(self, stack: jax.Array, layer: jax.Array, *, spec: PartitionSpec) -> jax.Array:
        if not spec or spec[0] is None:
            return stack[layer]

        def of_rank(own: jax.Array, layer: jax.Array) -> jax.Array:
            """Sums over ranks, all but one of which have zeros."""
            place = layer - jax.lax.axis_index(PIPE) * len(own)
            is_here = (place >= 0) & (place < len(own))
            value = own[jnp.clip(place, 0, len(own) - 1)]
            # As integers: a sum of -0.0 and 0.0 has other bits than -0.0.
            bits = jax.lax.bitcast_convert_type(value, f"uint{8 * value.dtype.itemsize}")
            bits = jax.lax.psum(jnp.where(is_here, bits, jnp.zeros_like(bits)), PIPE)
            return jax.lax.bitcast_convert_type(bits, value.dtype)

        return jax.shard_map(
            of_rank,
            mesh=self._mesh,
            in_specs=(spec, PartitionSpec()),
            out_specs=PartitionSpec(*spec[1:]),
        )(stack, layer)


_EMBEDDING = "embedder/input_embedding"
# tunix's names of the projections that its preparation of Gemma 3 stacks, and of their stacks.
_STACKED = re.compile(r"tmp\.layers\.([0-9]+)\.attn\.([qkv])")


def _find(folder: Folder, published: Published, params: Any) -> dict[Leaf, list[Tensor]]:
    """Finds the tensors of each leaf, by the table of tunix's loader."""
    to_leaf = importlib.import_module("tunix.utils.torch_utils").torch_key_to_jax_key
    names = published.names()
    found: dict[Leaf, list[Tensor]] = {}
    for name in sorted(folder.files):
        try:
            key, transform = to_leaf(names, name)
        except ValueError:
            continue
        permuted, shape = transform or (None, None)
        options: dict[str, Any] = {"name": name, "permuted": permuted, "shape": shape}
        if stacked := _STACKED.fullmatch(key):
            layer, part = int(stacked[1]), stacked[2]
            path, entry = _stack_of(part, params)
            leaf: Leaf = (layer, path)
            tensor = Tensor(leaf=leaf, entry=entry, ordered=(1, 0, 2), **options)
        else:
            leaf = _leaf_of(key)
            tensor = Tensor(leaf=leaf, **options)
        layer, path = leaf
        if path in params["ends" if layer is None else "blocks"]:
            found.setdefault(leaf, []).append(tensor)
    for tensors in found.values():
        tensors.sort(key=lambda tensor: tensor.entry or 0)
    return found


def _stack_of(part: str, params: Any) -> tuple[str, int | None]:
    """Finds the stack of Gemma's q, k or v, and the place in it."""
    if "attn/qkv_einsum/w" in params["blocks"]:
        return "attn/qkv_einsum/w", "qkv".index(part)
    return ("attn/q_einsum/w", None) if part == "q" else ("attn/kv_einsum/w", "kv".index(part))


def _leaf_of(key: str) -> Leaf:
    first, *rest = key.split(".")
    if first != "layers":
        return None, "/".join((first, *rest))
    return int(rest[0]), "/".join(rest[1:])


def _shape_of(tensor: Tensor, stored: tuple[int, ...]) -> tuple[int, ...] | None:
    """Gives the shape that a stored one becomes; None if it cannot be reshaped."""
    order = tensor.permuted or range(len(stored))
    if len(order) != len(stored):
        return None
    shape = tuple(stored[dim] for dim in order)
    if tensor.shape is not None:
        if math.prod(shape) != math.prod(tensor.shape):
            return None
        shape = tuple(tensor.shape)
    return shape if tensor.ordered is None else tuple(shape[dim] for dim in tensor.ordered)


def _show(leaf: Leaf) -> str:
    layer, path = leaf
    return path if layer is None else f"layer {layer}'s {path}"
