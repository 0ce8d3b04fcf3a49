"""Writes a program of a seed: the source of a loss function as a person would write it."""

import linecache
import textwrap
import zlib
from dataclasses import dataclass
from typing import Any

from experiments.fuzz_losses import inputs, loops, outputs
from experiments.fuzz_losses.choices import choose
from experiments.fuzz_losses.draft import BY_INDEX, IN_PYTHON, OWN, Draft, Group, indent
from experiments.fuzz_losses.layers import add_arguments, write_layers

IMPORTS = """
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
"""
DRAW = """
def draw(rng, *shape):
    return 0.3 * rng.standard_normal(shape)
"""
ENCODER = """
def encoder_layer(p, m):
    scores = (m @ p["q"]) @ jnp.swapaxes(m @ p["k"], -1, -2)
    m = m + jax.nn.softmax(scores) @ (m @ p["v"])
    return m + jnp.tanh(m @ p["up"]) @ p["down"]


def init_encoder_layer(rng, width):
    return {name: draw(rng, width, width) for name in ("q", "k", "v", "up", "down")}
"""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A loss function, and how `from_loss` is to be called for it.

    Attributes:
      seed: Its seed.
      source: Python, which defines `init(key)`, `loss_fn(params, batch)` (with rng if `has_key`)
        and `make_batch(key, rows)`; keys of init and make_batch are numbers.
      features: Their names (`features.names`).
      layers: For `layers=`.
      shared: For `shared=`.
      has_aux: Whether loss_fn returns metrics.
      has_key: Whether it takes a key.
      num_layers: The number of layers, over all groups.
    """

    seed: int
    source: str
    features: tuple[str, ...]
    layers: tuple[str, ...]
    shared: tuple[str, ...]
    has_aux: bool
    has_key: bool
    num_layers: int

    @property
    def file(self) -> str:
        """The name under which it is compiled."""
        return f"program_{self.seed}.py"

    @property
    def digest(self) -> int:
        """A number of its source, by which results of another grammar are known."""
        return zlib.crc32(self.source.encode())

    def load(self) -> dict[str, Any]:
        """Runs the source; its functions by name. Messages then quote its lines."""
        lines = self.source.splitlines(keepends=True)
        linecache.cache[self.file] = (len(self.source), None, lines, self.file)
        namespace: dict[str, Any] = {"__name__": f"program_{self.seed}"}
        exec(compile(self.source, self.file, "exec"), namespace)
        return namespace


def write(seed: int) -> Program:
    """Writes the program of a seed."""
    draft = choose(seed)
    inputs.write_input(draft)
    of_positions = inputs.write_positions(draft)
    of_mask = inputs.write_mask(draft) if draft.has("transformer") else []
    inputs.write_input_dropout(draft)
    inputs.write_shared(draft)
    add_arguments(draft)
    arguments = [*of_mask, *of_positions, *["first"] * draft.has("value-residual")]
    groups, before = _groups(draft)
    if "encoder" in draft.extras:
        draft.close("memory")
    function, functions = write_layers(draft, arguments)
    outputs.add_outs(draft)
    set_ways(draft)
    groups = [_with_function(group, function) for group in groups]
    runs = _runs(draft, groups)
    has_key = draft.has("input-dropout") or "keys" in draft.choices
    loss = outputs.write_loss(draft)
    layers_losses = outputs.write_layers_losses(draft)
    metrics = outputs.write_metrics(draft, loss)
    body = [
        *['params = params["params"]'] * draft.is_in_params,
        *["params = jax.tree.map(lambda a: a.astype(jnp.float64), params)"]
        * draft.has("cast-first"),
        *_first(draft, groups),
        *draft.setup,
        *before,
        *runs,
        *outputs.write_states(draft),
        *loss,
        *layers_losses,
        f"return loss, {metrics}" if metrics else "return loss",
    ]
    shared = [f"{_first_layer(draft, groups[0])}/table"] if draft.first_leaves else []
    all_groups = [_encoder(draft)] * draft.has("encoder") + groups
    sections = [
        textwrap.fill(f'"""Program {seed}: {", ".join(draft.features())}."""', 96),
        IMPORTS.strip("\n"),
        "\n".join([*(f"{name} = {n}" for name, n in draft.sizes.items()), *draft.constants]),
        "",
        DRAW.strip("\n"),
        *(text for text in draft.helpers.values()),
        *[ENCODER.strip("\n")] * draft.has("encoder"),
        "\n".join(functions).strip("\n"),
        "\n".join(_loss_fn(draft, body, has_key=has_key, has_aux=bool(metrics))),
        "\n".join(_init(draft, all_groups)),
        "\n".join(_make_batch(draft)),
    ]
    return Program(
        seed=seed,
        source="\n\n".join(sections[:3]) + "\n\n\n" + "\n\n\n".join(sections[4:]) + "\n",
        features=tuple(draft.features()),
        layers=tuple(loops.path_of(draft, group) for group in all_groups),
        shared=tuple(shared),
        has_aux=bool(metrics),
        has_key=has_key,
        num_layers=sum(draft.sizes[group.count] for group in all_groups),
    )


def set_ways(draft: Draft) -> None:
    """Has losses of layers added up as they run, where that is the program's way."""
    for out in draft.outs:
        weighted = out.way == "weighted-sum" and draft.form in (*IN_PYTHON, *BY_INDEX)
        out.is_running = out.way == "running-sum" or weighted
        out.factor = "(i + 1) / LAYERS * " * weighted


def _groups(draft: Draft) -> tuple[list[Group], list[str]]:
    """Gives the groups of layers that have the grammar's layer, and the lines ahead of them."""
    streams = {
        "one-stream": [],
        "reversible": ["y = x"],
        "swapped": ["y = jnp.tanh(x)"],
        "hyper-connections": ["streams = jnp.stack([x, x])"],
    }[draft.choices["streams"]]
    if draft.has("two-widths"):
        draft.ends["widen"] = "draw(rng, WIDTH, WIDE)"
        widths = {"narrow": "WIDTH", "wide": "WIDE"}
        groups = [
            Group(name=name, count="LAYERS", width=width, function="", init="")
            for name, width in widths.items()
        ]
        return groups, streams
    name = draft.random.choice(("block", "layer"))
    name = name if draft.form == "names" else f"{name}s"
    if draft.form == "nested" or draft.has("encoder"):
        name = "decoder"
    groups = [Group(name=name, count="LAYERS", width="WIDTH", function="", init="")]
    return groups, [*_encoder_lines(draft), *streams]


def _with_function(group: Group, function: str) -> Group:
    init = " ".join(f"init_{word}" if word.endswith("layer") else word for word in function.split())
    return Group(
        name=group.name, count=group.count, width=group.width, function=function, init=init
    )


def _encoder(draft: Draft) -> Group:
    return Group(
        name="encoder",
        count="ENCODER_LAYERS",
        width="WIDTH",
        function="encoder_layer",
        init="init_encoder_layer",
    )


def _encoder_lines(draft: Draft) -> list[str]:
    """Writes the encoder's run."""
    if not draft.has("encoder"):
        return []
    draft.batch["source"] = "rng.standard_normal((rows, 3, WIDTH))"
    lines = ['memory = batch["source"]']
    if draft.chance(0.6):
        draft.batch["source"] = "rng.integers(0, VOCAB, (rows, 3))"
        draft.ends["source_embed"] = "draw(rng, VOCAB, WIDTH)"
        lines = ['memory = params["source_embed"][batch["source"]]']
    if draft.form not in OWN:
        step = "lambda m, p: (encoder_layer(p, m), None)"
        return [*lines, f'memory, _ = lax.scan({step}, memory, params["encoder"])']
    p = {"names": 'params[f"encoder_{i}"]', "list": 'params["encoder"][i]'}
    p["nested"] = 'params["encoder"][f"layers_{i}"]'
    return [
        *lines,
        "for i in range(ENCODER_LAYERS):",
        f"    memory = encoder_layer({p[draft.form]}, memory)",
    ]


def _runs(draft: Draft, groups: list[Group]) -> list[str]:
    """Writes the runs of all groups, down to one last stream x."""
    lines = loops.run(draft, groups[0])
    for group in groups[1:]:
        lines += ['x = x @ params["widen"]', *loops.run(draft, group)]
    streams = draft.choices["streams"]
    last = {"reversible": "x = x + y", "swapped": "x = x + y"}
    last["hyper-connections"] = "x = streams.sum(0)"
    return [*lines, *[last.get(streams, "")] * (streams in last)]


def _first_layer(draft: Draft, group: Group) -> str:
    return loops.path_of(draft, group).replace("{}", "0")


def _first(draft: Draft, groups: list[Group]) -> list[str]:
    """Writes the lines that read the first layer's table."""
    if not draft.first_leaves:
        return []
    return [f'table = {_at(draft, groups[0], "0")}["table"]']


def _at(draft: Draft, group: Group, i: str) -> str:
    """Gives the expression of layer i's own parameters, for a number."""
    forms = {
        "names": f'params["{group.name}_{i}"]',
        "list": f'params["{group.name}"][{i}]',
        "nested": f'params["{group.name}"]["layers_{i}"]',
    }
    return forms[draft.form]


def _loss_fn(draft: Draft, body: list[str], *, has_key: bool, has_aux: bool) -> list[str]:
    """Writes loss_fn, and the function of one row that it may be made of."""
    arguments = ["params", "batch", *["rng"] * has_key]
    name = "row_loss" if draft.is_vmapped else "loss_fn"
    head = f"def {name}({', '.join(arguments)}):"
    jit = ["@jax.jit"] * draft.has("jit-model")
    if not draft.is_vmapped:
        return [*jit, head, *indent(body)]
    axes = ", ".join(["None", "0", *["None"] * has_key])
    call = f"jax.vmap(row_loss, in_axes=({axes}))({', '.join(arguments)})"
    ends = [f"return {call}.mean()"]
    if has_aux:
        ends = [
            f"losses, metrics = {call}",
            "return losses.mean(), jax.tree.map(lambda a: a.mean(0), metrics)",
        ]
    outer = [*jit, f"def loss_fn({', '.join(arguments)}):", *indent(ends)]
    return [head, *indent(body), "", "", *outer]


def _init(draft: Draft, groups: list[Group]) -> list[str]:
    """Writes init."""
    lines = ["rng = np.random.default_rng(key)", "params = {"]
    lines += indent([f'"{name}": {value},' for name, value in draft.ends.items()])
    lines.append("}")
    narrow = draft.has("cast-in-layer")
    for group in groups:
        make = f"({group.init})" if " " in group.init else group.init
        made = f"{make}(rng, {group.width})"
        if narrow:
            made = f"jax.tree.map(np.float32, {made})"
        each = f"{made} for i in range({group.count})"
        if draft.form == "names":
            lines += [
                f"for i in range({group.count}):",
                f'    params[f"{group.name}_{{i}}"] = {made}',
            ]
        elif draft.form == "list":
            lines.append(f'params["{group.name}"] = [{each}]')
        elif draft.form == "nested":
            lines.append(f'params["{group.name}"] = {{f"layers_{{i}}": {each}}}')
        else:
            lines.append(f"rows = [{each}]")
            lines.append(f'params["{group.name}"] = jax.tree.map(lambda *a: np.stack(a), *rows)')
    for name, value in draft.first_leaves.items():
        lines.append(f'{_at(draft, groups[-1], "0")}["{name}"] = {value}')
    if draft.has("cast-first"):
        lines.append("params = jax.tree.map(np.float32, params)")
    lines.append('return {"params": params}' if draft.is_in_params else "return params")
    return ["def init(key):", *indent(lines)]


def _make_batch(draft: Draft) -> list[str]:
    """Writes make_batch."""
    lines = ["rng = np.random.default_rng(key)", "return {"]
    lines += indent([f'"{name}": {value},' for name, value in draft.batch.items()])
    return ["def make_batch(key, rows):", *indent([*lines, "}"])]
