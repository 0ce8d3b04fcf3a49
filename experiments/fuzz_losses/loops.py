"""The lines that run layers: a loop in Python, a scan, a fori_loop."""

from experiments.fuzz_losses.draft import BY_INDEX, FORI, IN_PYTHON, OWN, Draft, Group, Out, indent
from experiments.fuzz_losses.layers import policy_of, state_of


def run(draft: Draft, group: Group) -> list[str]:
    """Writes the lines in which the layers of a group run, and change the state."""
    lines = _before(draft, group)
    if draft.form in IN_PYTHON:
        return [*lines, *_in_python(draft, group)]
    if draft.form in BY_INDEX:
        return [*lines, *_by_index(draft, group)]
    return [*lines, *_scanned(draft, group)]


def source_of(draft: Draft, group: Group) -> str:
    """Gives the expression of what holds a group's layers."""
    return f'params["{group.name}"]'


def path_of(draft: Draft, group: Group) -> str:
    """Gives the path for `layers=`."""
    prefix = "params/" if draft.is_in_params else ""
    ends = {"names": f"{group.name}_{{}}", "list": f"{group.name}/{{}}"}
    ends["nested"] = f"{group.name}/layers_{{}}"
    return prefix + ends.get(draft.form, group.name)


def _before(draft: Draft, group: Group) -> list[str]:
    """Writes the keys of all layers."""
    lines = []
    if group.name == "wide" and draft.has("fold-in", "split"):
        lines.append("rng = jax.random.fold_in(rng, 99)")
    if draft.has("split"):
        lines.append(f"keys = jax.random.split(rng, {group.count})")
    return lines


def _own_params(draft: Draft, group: Group, i: str) -> str:
    """Gives the expression of the parameters of layer i, of layers of their own."""
    if draft.form == "names":
        return f'params[f"{group.name}_{{{i}}}"]'
    if draft.form == "nested":
        return f'params["{group.name}"][f"layers_{{{i}}}"]'
    return f'params["{group.name}"][{i}]'


def _call(draft: Draft, group: Group, p: str, *, items: list[str], wrap: bool) -> list[str]:
    """Writes the call of one layer, which sets the state and the values that it returns."""
    function, lines = group.function, []
    wrapper = {
        "checkpoint": "jax.checkpoint({})",
        "checkpoint-policy": (
            f"jax.checkpoint({{}}, policy=jax.checkpoint_policies.{policy_of(draft)})"
        ),
        "jit-layer": "jax.jit({})",
    }.get(draft.choices["wrapping"])
    if wrap and wrapper and draft.wraps_in_loop:
        lines.append(f"run = {wrapper.format(function)}")
        function = "run"
    elif " " in function:
        lines.append(f"run = {function}")
        function = "run"
    state = state_of(draft)
    outs = [out.name for out in draft.outs if out.expression is None]
    target = f"({state})" if outs and ", " in state else state
    arguments = [p, *state.split(", "), *draft.closed, *items]
    return [*lines, f"{', '.join([target, *outs])} = {function}({', '.join(arguments)})"]


def _kept(draft: Draft) -> list[Out]:
    """Lists the values of each layer that are kept for later."""
    return [out for out in draft.outs if out.many]


def _in_python(draft: Draft, group: Group) -> list[str]:
    source, lines, heads = source_of(draft, group), [], []
    loop = f"for i in range({group.count}):"
    if draft.form in OWN:
        p = _own_params(draft, group, "i")
        if draft.form == "list" and draft.chance(0.6):
            loop, p = f"for i, p in enumerate({source}):", "p"
    elif draft.form == "stack-indexed":
        heads.append(f"p = jax.tree.map(lambda a: a[i], {source})")
        p = "p"
    elif draft.form == "stack-iterated":
        lines.append(f"leaves, structure = jax.tree.flatten({source})")
        loop, p = "for i, rows in enumerate(zip(*leaves)):", "p"
        heads.append("p = jax.tree.unflatten(structure, rows)")
    else:
        if draft.form == "stack-listed":
            lines.append(
                f"layers = [jax.tree.map(lambda a: a[i], {source}) for i in range({group.count})]"
            )
        else:
            lines += [
                f"leaves, structure = jax.tree.flatten({source})",
                f"parts = [jnp.split(leaf, {group.count}) for leaf in leaves]",
                "rows = zip(*([a[0] for a in part] for part in parts))",
                "layers = [jax.tree.unflatten(structure, row) for row in rows]",
            ]
        loop, p = "for i, p in enumerate(layers):", "p"
    items = [a.item for a in draft.per_layer]
    if draft.has("chain"):
        heads.append("rng, key = jax.random.split(rng)")
    if draft.has("checkpoint-pairs"):
        return [*lines, *_pairs(draft, group, items)]
    if p != "p" and (draft.has("frozen-layers") or draft.chance(0.4)):
        heads.append(f"p = {p}")
        p = "p"
    if draft.has("frozen-layers"):
        heads += ["if i < LAYERS // 2:", "    p = lax.stop_gradient(p)"]
    lines += _starts(draft, group)
    body = [*heads, *_around(draft, _call(draft, group, p, items=items, wrap=True), group)]
    for out in _kept(draft):
        value = out.expression or out.name
        if out.is_running:
            body.append(f"{out.many} = {out.many} + {out.factor}{value}")
        else:
            body.append(f"{out.many}.append({value})")
    return [*lines, loop, *indent(body)]


def _starts(draft: Draft, group: Group) -> list[str]:
    """Writes the empty lists and sums ahead of a loop."""
    if group.name == "wide":
        return []
    starts = [f"{out.many} = {'0.0' if out.is_running else '[]'}" for out in _kept(draft)]
    if draft.has("u-net"):
        starts.append("skips = []")
    if draft.has("value-residual"):
        starts.append("first = None")
    if draft.has("dense-mean"):
        starts.append("outputs = [x]")
    return starts


def _around(draft: Draft, call: list[str], group: Group) -> list[str]:
    """Writes a layer's call within the skips that lead past layers."""
    count = group.count
    if draft.has("u-net"):
        joined = "x + skips.pop()"
        if "merge" in draft.ends:
            joined = 'jnp.concatenate([x, skips.pop()], -1) @ params["merge"][i]'
        return [
            f"if i >= {count} - {count} // 2:",
            f"    x = {joined}",
            *call,
            f"if i < {count} // 2:",
            "    skips.append(x)",
        ]
    if draft.has("first-skip"):
        return [
            *call,
            "if i == 0:",
            "    first_output = x",
            "else:",
            "    x = x + 0.5 * first_output",
        ]
    if draft.has("value-residual"):
        return [*call, "first = values if first is None else first"]
    if draft.has("dense-mean"):
        return ["x = sum(outputs) / len(outputs)", *call, "outputs.append(x)"]
    return call


def _pairs(draft: Draft, group: Group, items: list[str]) -> list[str]:
    """Writes a loop over pairs of layers, each under one checkpoint."""
    state = state_of(draft)
    if draft.form in OWN:
        p = _own_params(draft, group, "i")
    else:
        p = f"jax.tree.map(lambda a: a[i], {source_of(draft, group)})"
    call = _call(draft, group, p, items=items, wrap=False)
    name = f"{group.name}_pair"
    static = f"static_argnums={len(state.split(', '))}"
    return [
        f"def {name}({state}, start):",
        "    for i in (start, start + 1):",
        *indent(call, 2),
        f"    return {state}",
        "",
        f"for start in range(0, {group.count}, 2):",
        f"    {state} = jax.checkpoint({name}, {static})({state}, start)",
    ]


def _carry(draft: Draft) -> list[str]:
    """Names the values that a loop carries."""
    names = state_of(draft).split(", ")
    names += [out.many for out in _kept(draft) if out.is_running]
    return names + ["rng"] * draft.has("chain")


def _tuple(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"({', '.join(names)})"


def _body(draft: Draft, group: Group, p: str, items: list[str]) -> list[str]:
    """Writes a layer inside of a loop that JAX runs, and the running sums."""
    lines = ["rng, key = jax.random.split(rng)"] * draft.has("chain")
    lines += _call(draft, group, p, items=items, wrap=draft.form in BY_INDEX)
    for out in _kept(draft):
        if out.is_running:
            value = out.expression or out.name
            lines.append(f"{out.many} = {out.many} + {out.factor}{value}")
    return lines


def _zeros(draft: Draft, group: Group) -> list[str]:
    if group.name == "wide":
        return []
    return [f"{out.many} = jnp.zeros(())" for out in _kept(draft) if out.is_running]


def _by_index(draft: Draft, group: Group) -> list[str]:
    """Writes a loop over indices, whose body indexes the stack."""
    row = "a[i]"
    if draft.form == "fori-dynamic":
        row = "lax.dynamic_index_in_dim(a, i, keepdims=False)"
    carry, name = _carry(draft), f"{group.name}_step"
    items = [a.traced or a.item for a in draft.per_layer]
    ys = [out.expression or out.name for out in _kept(draft) if not out.is_running]
    many = [out.many for out in _kept(draft) if not out.is_running]
    is_fori = draft.form in FORI
    single = len(carry) == 1
    result = _tuple(carry) if single or not is_fori else ", ".join(carry)
    body = [] if single else [f"{', '.join(carry)} = carry"]
    body.append(f"p = jax.tree.map(lambda a: {row}, {source_of(draft, group)})")
    body += _body(draft, group, "p", items)
    argument = carry[0] if single else "carry"
    lines = _zeros(draft, group)
    if is_fori:
        return [
            *lines,
            f"def {name}(i, {argument}):",
            *indent([*body, f"return {result}"]),
            "",
            f"{', '.join(carry)} = lax.fori_loop(0, {group.count}, {name}, {_tuple(carry)})",
        ]
    out, gives = _results(many, ys)
    return [
        *lines,
        f"def {name}({argument}, i):",
        *indent([*body, f"return {result}, {gives}"]),
        "",
        f"{_tuple(carry)}, {out} = lax.scan({name}, {_tuple(carry)}, jnp.arange({group.count}))",
    ]


def _results(many: list[str], ys: list[str]) -> tuple[str, str]:
    """Gives the target and the value of a scan's ys."""
    return (_tuple(many), _tuple(ys)) if many else ("_", "None")


def _scanned(draft: Draft, group: Group) -> list[str]:
    """Writes a scan over the stack and the arguments that differ by layer."""
    carry, name = _carry(draft), f"{group.name}_step"
    inputs, xs, items = ["p"], [source_of(draft, group)], []
    by_index = [a.stacked is None for a in draft.per_layer]
    for argument in draft.per_layer:
        if argument.name == "key" and draft.has("chain"):
            items.append("key")
        elif argument.stacked is None:
            items.append(argument.item)
        else:
            items.append(argument.name)
            inputs.append(argument.name)
            xs.append(argument.stacked.replace("LAYERS", group.count))
    if (any(by_index) or draft.has("hint-losses")) and "i" not in inputs:
        inputs.append("i")
        xs.append(f"jnp.arange({group.count})")
    many = [out.many for out in _kept(draft) if not out.is_running]
    out, gives = _results(many, [o.expression or o.name for o in _kept(draft) if not o.is_running])
    body = [] if len(carry) == 1 else [f"{', '.join(carry)} = carry"]
    body += [] if len(inputs) == 1 else [f"{', '.join(inputs)} = inputs"]
    body += _body(draft, group, "p", items)
    arguments = [carry[0] if len(carry) == 1 else "carry", "p" if len(inputs) == 1 else "inputs"]
    lines = [
        *_zeros(draft, group),
        f"def {name}({', '.join(arguments)}):",
        *indent([*body, f"return {_tuple(carry)}, {gives}"]),
        "",
    ]
    step = name
    wrapper = {
        "checkpoint": f"jax.checkpoint({name})",
        "checkpoint-policy": (
            f"jax.checkpoint({name}, policy=jax.checkpoint_policies.{policy_of(draft)})"
        ),
        "jit-layer": f"jax.jit({name})",
    }.get(draft.choices["wrapping"])
    if wrapper and draft.wraps_in_loop:
        step = wrapper
    whole, state = _tuple(xs), _tuple(carry)
    if len(whole) > 60 and draft.form in ("scan", "scan-unrolled"):
        lines += ["xs = (", *indent([f"{x}," for x in xs]), ")"] if len(xs) > 1 else []
        whole = "xs" if len(xs) > 1 else whole
    if draft.form == "scan":
        return [*lines, f"{state}, {out} = lax.scan({step}, {state}, {whole})"]
    if draft.form == "scan-unrolled":
        return [*lines, f"{state}, {out} = lax.scan({step}, {state}, {whole}, unroll=2)"]
    lines.append(f"xs = {whole}")
    if draft.form == "scan-groups":
        groups = f"lambda a: a.reshape({group.count} // 2, 2, *a.shape[1:])"
        lines += [
            f"groups = jax.tree.map({groups}, xs)",
            f"inner = lambda carry, group: lax.scan({step}, carry, group)",
            f"{state}, {out} = lax.scan(inner, {state}, groups)",
        ]
        lines += [f"{m} = {m}.reshape({group.count}, *{m}.shape[2:])" for m in many]
        return lines
    if draft.form == "scan-after-first":
        firsts = [f"first_{m}" for m in many]
        return [
            *lines,
            "first = jax.tree.map(lambda a: a[0], xs)",
            f"{state}, {_results(firsts, firsts)[0]} = {name}({state}, first)",
            f"{state}, {out} = lax.scan({step}, {state}, jax.tree.map(lambda a: a[1:], xs))",
            *(
                f"{m} = jnp.concatenate([{f}[None], {m}])"
                for m, f in zip(many, firsts, strict=True)
            ),
        ]
    half = f"{group.count} // 2"
    firsts = [f"lower_{m}" for m in many]
    return [
        *lines,
        f"lower = jax.tree.map(lambda a: a[:{half}], xs)",
        f"upper = jax.tree.map(lambda a: a[{half}:], xs)",
        f"{state}, {_results(firsts, firsts)[0]} = lax.scan({step}, {state}, lower)",
        f"{state}, {out} = lax.scan({step}, {state}, upper)",
        *(f"{m} = jnp.concatenate([{f}, {m}])" for m, f in zip(many, firsts, strict=True)),
    ]
