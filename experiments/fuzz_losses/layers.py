"""The functions of a program's layers, and of their parameters."""

from dataclasses import dataclass

from experiments.fuzz_losses import pieces
from experiments.fuzz_losses.draft import Draft, Out, PerLayer, indent


@dataclass(frozen=True)
class Branch:
    """A part of a layer: where its parameters are, and its value of {h}.

    Attributes:
      place: Its parameters' key.
      call: Its expression, with {h} for its input.
      returns: A second value that it returns, or "".
    """

    place: str
    call: str
    returns: str = ""


def add_arguments(draft: Draft) -> None:
    """Draws the arguments that differ by layer, for the extras that need them."""
    literals = {"depth-scale": "depth", "stochastic-depth": "rate", "gradient-scale": "factor"}
    for extra, name in literals.items():
        if extra in draft.extras:
            add_literal(draft, name)
    if draft.has("recurrent"):
        add_literal(draft, "decay")
    if draft.has("bias-by-layer"):
        draft.ends["layer_bias"] = "draw(rng, LAYERS, WIDTH)"
        table = 'params["layer_bias"]'
        draft.per_layer.append(PerLayer(name="bias_here", item=f"{table}[i]", stacked=table))
    if draft.has("token-table-by-layer"):
        if draft.chance(0.5):
            draft.ends["token_tables"] = "draw(rng, LAYERS, VOCAB, WIDTH)"
            item, stacked = (f'params["token_tables"][{i}, batch["tokens"]]' for i in ("i", ":"))
        else:
            draft.ends["token_tables"] = "draw(rng, VOCAB, LAYERS, WIDTH)"
            draft.setup.append('by_layer = params["token_tables"][batch["tokens"]]')
            item, stacked = "by_layer[..., i, :]", "jnp.moveaxis(by_layer, -2, 0)"
        draft.per_layer.append(PerLayer(name="of_token", item=item, stacked=stacked))
    if draft.has("index-cond"):
        draft.per_layer.append(PerLayer(name="i", item="i", stacked="jnp.arange(LAYERS)"))
    if draft.has("dropout", "stochastic-depth", "noise"):
        kind, stacked = draft.pick("keys", None, "chain" * draft.has("checkpoint-pairs")), "keys"
        item = {"fold-in": "jax.random.fold_in(rng, i)", "split": "keys[i]", "chain": "key"}[kind]
        if kind == "fold-in":
            stacked = "jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(LAYERS))"
            stacked = None if draft.chance(0.5) else stacked
        draft.per_layer.append(PerLayer(name="key", item=item, stacked=stacked))


def add_literal(draft: Draft, name: str) -> None:
    """Adds a number that is another literal in each layer."""
    layers = draft.sizes["LAYERS"]
    if name == "depth" and draft.chance(0.6):
        stacked = "1 / (1 + jnp.arange(LAYERS))" if draft.chance(0.5) else None
        draft.per_layer.append(PerLayer(name=name, item="1 / (i + 1)", stacked=stacked))
        return
    start, end = {"rate": (0, 0.3), "window": (1, 4), "decay": (0.5, 0.9)}.get(name, (1, 0.5))
    values = [round(start + (end - start) * k / max(layers - 1, 1), 3) for k in range(layers)]
    if name == "window":
        values = [draft.random.choice((2, 3, 5)) for _ in values]
    table = f"{name.upper()}S"
    draft.constant(table, values)
    array = f"jnp.array({table})"
    draft.per_layer.append(
        PerLayer(name=name, item=f"{table}[i]", stacked=array, traced=f"{array}[i]")
    )


def write_layers(draft: Draft, attention_arguments: list[str]) -> tuple[str, list[str]]:
    """Writes the functions of layers.

    Returns:
      The expression of the function of layer i, and lines that define the functions.
    """
    kinds = {"layer": _branches(draft, attention_arguments)}
    mlps = kinds["layer"][1:]
    call = "layer"
    if draft.has("attention-mlp-turns"):
        kinds = {"attention_layer": kinds["layer"][:1], "mlp_layer": mlps}
        call = "attention_layer if i % 2 == 0 else mlp_layer"
    elif draft.has("dense-expert-turns", "dense-first"):
        mixer = kinds["layer"][:-1]
        dense = [Branch("mlp", "mlp(p, {h})"), Branch("experts", "experts(p, {h})", "balance")]
        kinds = {"dense_layer": [*mixer, dense[0]], "expert_layer": [*mixer, dense[1]]}
        test = "i == 0" if draft.has("dense-first") else "i % 2 == 0"
        call = f"dense_layer if {test} else expert_layer"
    if draft.has("experts", "dense-expert-turns", "dense-first"):
        draft.outs.append(
            Out(name="balance", many="balances", expression=None, way=draft.choices["auxiliary"])
        )
    if draft.has("value-residual"):
        draft.outs.append(Out(name="values", many="", expression=None, way=""))
    if draft.has("u-net") and draft.chance(0.4):
        draft.ends["merge"] = "draw(rng, LAYERS, 2 * WIDTH, WIDTH)"
    lines = []
    for name, branches in kinds.items():
        lines += [*_layer(draft, name, branches), "", ""]
    return call, lines


def _branches(draft: Draft, arguments: list[str]) -> list[Branch]:
    """Draws the branches of a layer, and writes their functions."""
    block = draft.choices["block"]
    branches = []
    if block == "transformer":
        init = pieces.attention(draft, arguments)
        draft.inits["attention"] = init
        values = "values" if "first" in arguments else ""
        text = f"attention({', '.join(['p', '{h}', *arguments])})"
        branches.append(Branch("attention", text, values))
    others = {
        "mixer": ("mix_positions", "mix_positions(p, {h})"),
        "recurrent": ("recurrence", "recurrence(p, {h}, decay)"),
        "convolution": ("convolution", "convolution(p, {h})"),
        "token-shift": ("token_shift", "token_shift(p, {h})"),
    }
    if block in others:
        place, text = others[block]
        draft.inits[place] = pieces.INITS[place]
        branches.append(Branch(pieces.need(draft, place), text))
    if draft.has("encoder"):
        draft.inits["cross_attention"] = pieces.INITS["cross_attention"]
        pieces.need(draft, "cross_attention")
        branches.append(Branch("cross_attention", "cross_attention(p, {h}, memory)"))
    if draft.has("dense-expert-turns", "dense-first"):
        for kind in ("plain-mlp", "experts"):
            name, init = pieces.mlp(draft, kind)
            draft.inits[name] = init
        branches.append(Branch("mlp", "mlp(p, {h})"))
    else:
        name, init = pieces.mlp(draft, draft.choices["mlp"])
        draft.inits[name] = init
        branches.append(Branch(name, f"{name}(p, {{h}})", "balance" * (name == "experts")))
    return branches


def _layer(draft: Draft, name: str, branches: list[Branch]) -> list[str]:
    """Writes the functions of one kind of layer and of its parameters."""
    leaves: dict[str, str] = {}
    streams = draft.choices["streams"]
    state = state_of(draft)
    main = {"swapped": "z", "hyper-connections": "x"}.get(streams, "x")
    body = []
    if draft.has("cast-in-layer"):
        body.append(f"p = jax.tree.map(lambda a: a.astype({state.split(', ')[0]}.dtype), p)")
    if streams == "swapped":
        body.append("z = y")
    elif streams == "hyper-connections":
        leaves |= {
            "read": "1 + draw(rng, 2)",
            "mix": "draw(rng, 2, 2)",
            "write": "1 + draw(rng, 2)",
        }
        body.append('x = jnp.tensordot(p["read"], streams, 1)')
    body += _prelude(draft, main, leaves)
    keyed = draft.has("dropout", "stochastic-depth")
    many_keys = keyed and len(branches) > 1
    if many_keys:
        body.append(f"keys = jax.random.split(key, {len(branches)})")
    together = draft.has("parallel") and len(branches) > 1
    if together:
        body.append("h = " + pieces.norm(draft, main, 'p["norm"]', leaves))
    returned = {"balance": "jnp.zeros(())", "values": "None"}
    for k, branch in enumerate(branches):
        target, source = main, main
        if streams == "reversible":
            target, source = ("y", "x") if k % 2 == 0 else ("x", "y")
        key = f"keys[{k}]" if many_keys else "key"
        body += _branch(draft, branch, k, target, "" if together else source, key, leaves)
        if branch.returns:
            returned[branch.returns] = branch.returns
        leaves[branch.place] = draft.inits[branch.place]
    result = state
    if streams == "swapped":
        result = "y, x + z"
    elif streams == "hyper-connections":
        result = 'jnp.tensordot(p["mix"], streams, 1) + jnp.einsum("n,...->n...", p["write"], x)'
    outs = [returned[out.name] for out in draft.outs if out.expression is None]
    if outs and ", " in result:
        result = f"({result})"
    arguments = ["p", *state.split(", "), *draft.closed, *(a.name for a in draft.per_layer)]
    head = f"def {name}({', '.join(arguments)}):"
    init = [f'"{key}": {value},' for key, value in leaves.items()]
    return [
        *_decorator(draft),
        head,
        *indent([*body, f"return {', '.join([result, *outs])}"]),
        "",
        "",
        f"def init_{name}(rng, width):",
        *indent(["return {", *indent(init), "}"]),
    ]


def state_of(draft: Draft) -> str:
    """Names the values that go from layer to layer."""
    pairs = {"reversible": "x, y", "swapped": "x, y", "hyper-connections": "streams"}
    return pairs.get(draft.choices["streams"], "x")


def _decorator(draft: Draft) -> list[str]:
    lines = {
        "checkpoint": "@jax.checkpoint",
        "checkpoint-policy": "@partial(jax.checkpoint, policy=jax.checkpoint_policies.POLICY)",
        "jit-layer": "@jax.jit",
    }
    if draft.choices["wrapping"] not in lines or draft.wraps_in_loop:
        return []
    return [lines[draft.choices["wrapping"]].replace("POLICY", policy_of(draft))]


def policy_of(draft: Draft) -> str:
    """Names a policy of checkpoints."""
    return ("dots_saveable", "dots_with_no_batch_dims_saveable")[draft.sizes["SEQ"] % 2]


def _prelude(draft: Draft, x: str, leaves: dict[str, str]) -> list[str]:
    """Writes the lines at a layer's beginning, which change the stream x."""
    lines = []
    if draft.has("input-skip"):
        lines.append(f"{x} = {x} + 0.1 * x0")
    if draft.has("film"):
        leaves["film"] = "draw(rng, WIDTH, 2 * width)"
        lines.append('scale, shift = jnp.split(time @ p["film"], 2, -1)')
        lines.append(f"{x} = {x} * (1 + scale[..., None, :]) + shift[..., None, :]")
    if draft.has("bias-by-layer"):
        lines.append(f"{x} = {x} + bias_here")
    if draft.has("token-table-by-layer"):
        leaves["gate"] = "draw(rng, width, width)"
        lines.append(f'{x} = {x} + of_token * jax.nn.sigmoid({x} @ p["gate"])')
    if draft.has("shared-adapter"):
        leaves["adapter_scale"] = "draw(rng, width)"
        lines.append(f'{x} = {x} + p["adapter_scale"] * jnp.tanh({x} @ adapter)')
    if draft.has("table-in-first"):
        lines.append(f"{x} = {x} + table")
    if draft.has("noise"):
        lines.append(f"{x} = {x} + 0.05 * jax.random.normal(key, {x}.shape)")
    if draft.has("straight-through"):
        lines.append(f"{x} = {pieces.need(draft, 'quantise')}({x})")
    if draft.has("stop-gradient"):
        centre = f"lax.stop_gradient({x}.mean(-1, keepdims=True))"
        lines.append(f"{x} = {x} - {centre}")
    if draft.has("gradient-scale"):
        by = "_by" if draft.knows_index and draft.chance(0.5) else ""
        pieces.need(draft, f"scale_gradient{by}")
        lines.append(f"{x} = scale_gradient({x}, factor)")
    if draft.has("batch-cond"):
        lines.append(f"{x} = lax.cond(is_long, lambda x: 1.1 * x, lambda x: jnp.tanh(x), {x})")
    if draft.has("batch-switch"):
        cases = "[lambda x: x, jnp.sin, lambda x: 0.9 * x]"
        lines.append(f"{x} = lax.switch(mode, {cases}, {x})")
    if draft.has("index-cond"):
        if draft.knows_index:
            lines += ["if i % 2 == 0:", f"    {x} = jnp.roll({x}, 1, axis=-1)"]
        else:
            turn = "lambda x: jnp.roll(x, 1, axis=-1)"
            lines.append(f"{x} = lax.cond(i % 2 == 0, {turn}, lambda x: x, {x})")
    if draft.has("window-by-layer"):
        lines.append("distance = jnp.arange(SEQ)[:, None] - jnp.arange(SEQ)")
        lines.append("mask = mask & (distance < window)")
    if draft.has("rotary-in-layer", "rotary-by-layer"):
        base = ", base" * draft.has("rotary-by-layer")
        lines.append(f"cos, sin = {pieces.need(draft, 'rotary')}(WIDTH // HEADS{base})")
    if draft.has("local-global") and "is_local" in {a.name for a in draft.per_layer}:
        lines.append("mask = jnp.where(is_local, local, mask)")
    return lines


def _branch(
    draft: Draft,
    branch: Branch,
    k: int,
    target: str,
    source: str,
    key: str,
    leaves: dict[str, str],
) -> list[str]:
    """Writes `target = target + f(norm(source))`; without a source, of the norm h that is there."""
    residual, lines = draft.choices["residual"], []
    call = branch.call.replace("(p,", f'(p["{branch.place}"],')
    place = f'p["norm{k + 1}"]'
    if not source:
        h = "h"
    elif residual == "post-norm":
        h = source
    else:
        h = pieces.norm(draft, source, place, leaves)
    y = call.format(h=h)
    if branch.returns:
        lines.append(f"out, {branch.returns} = {y}")
        y = "out"
    if residual == "sandwich":
        y = pieces.norm(draft, y, f'p["norm{k + 1}_after"]', leaves)
    if draft.has("dropout"):
        y = f"{pieces.need(draft, 'dropout')}({key}, {y})"
    if draft.has("layer-scale"):
        leaves[f"gamma{k + 1}"] = "draw(rng, width)"
        y = f'p["gamma{k + 1}"] * {y}'
    if draft.has("rezero"):
        leaves[f"alpha{k + 1}"] = "draw(rng)"
        y = f'p["alpha{k + 1}"] * {y}'
    if draft.has("depth-scale"):
        y = f"depth * {y}"
    if draft.has("stochastic-depth"):
        y = f"{pieces.need(draft, 'drop_path')}({key}, {y}, rate)"
    alone = residual == "no-residual" or draft.choices["streams"] == "hyper-connections"
    if len(y) > 70:
        lines.append(f"out = {y}")
        y = "out"
    if residual == "post-norm":
        value = pieces.norm(draft, f"{target} + {y}", place, leaves)
    else:
        value = y if alone or target == "z" else f"{target} + {y}"
    return [*lines, f"{target} = {value}"]
