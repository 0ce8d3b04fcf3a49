"""The small functions that a program calls: norms, attention, MLPs, dropout."""

from experiments.fuzz_losses.draft import Draft

NORMS = {
    "rms-norm": """
def norm(x, scale):
    return x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale
""",
    "layer-norm": """
def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]
""",
    "rms-norm-bare": """
def norm(x):
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
""",
    "layer-norm-bare": """
def norm(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
""",
}
ACTIVATIONS = {
    "gelu": "jax.nn.gelu",
    "silu": "jax.nn.silu",
    "relu": "jax.nn.relu",
    "tanh": "jnp.tanh",
    "softmax-activation": "jax.nn.softmax",
    "squared-relu": "squared_relu",
    "own-custom-jvp": "softsign",
}
FUNCTIONS = {
    "squared_relu": """
def squared_relu(x):
    return jnp.square(jax.nn.relu(x))
""",
    "softsign": """
@jax.custom_jvp
def softsign(x):
    return x / (1 + jnp.abs(x))


@softsign.defjvp
def softsign_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return softsign(x), dx / jnp.square(1 + jnp.abs(x))
""",
    "dropout": """
def dropout(key, x, rate=0.1):
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
""",
    "drop_path": """
def drop_path(key, x, rate):
    keep = jax.random.bernoulli(key, 1 - rate, x.shape[:1] + (1,) * (x.ndim - 1))
    return keep * x / (1 - rate)
""",
    "scale_gradient": """
@jax.custom_vjp
def scale_gradient(x, factor):
    return x


def scale_gradient_fwd(x, factor):
    return x, factor


def scale_gradient_bwd(factor, g):
    return factor * g, jnp.zeros_like(factor)


scale_gradient.defvjp(scale_gradient_fwd, scale_gradient_bwd)
""",
    "scale_gradient_by": """
@partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_gradient(x, factor):
    return x


def scale_gradient_fwd(x, factor):
    return x, None


def scale_gradient_bwd(factor, _, g):
    return (factor * g,)


scale_gradient.defvjp(scale_gradient_fwd, scale_gradient_bwd)
""",
    "quantise": """
@jax.custom_vjp
def quantise(x):
    return jnp.round(8 * x) / 8


quantise.defvjp(lambda x: (quantise(x), None), lambda _, g: (g,))
""",
    "split_heads": """
def split_heads(x):
    return x.reshape(*x.shape[:-1], HEADS, -1)
""",
    "rotate": """
def rotate(x, cos, sin):
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
""",
    "rotary": """
def rotary(size, base=10.0):
    angles = jnp.arange(SEQ)[:, None] / base ** (jnp.arange(0, size, 2) / size)
    return jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
""",
    "cross_attention": """
def cross_attention(p, x, memory):
    scores = (x @ p["q"]) @ jnp.swapaxes(memory @ p["k"], -1, -2)
    return jax.nn.softmax(scores) @ (memory @ p["v"])
""",
    "mix_positions": """
def mix_positions(p, x):
    return jnp.einsum("st,...td->...sd", jnp.tanh(p["mix"]), x) + p["bias"]
""",
    "recurrence": """
def recurrence(p, x, decay):
    def step(state, token):
        state = decay * state + jnp.tanh(token @ p["in"])
        return state, state

    tokens = jnp.moveaxis(x, -2, 0)
    _, states = lax.scan(step, jnp.zeros_like(tokens[0]), tokens)
    return jnp.moveaxis(states, 0, -2) @ p["out"]
""",
    "convolution": """
def convolution(p, x):
    y = lax.conv_general_dilated(
        x, p["kernel"], (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC")
    )
    return y + p["bias"]
""",
    "token_shift": """
def token_shift(p, x):
    before = jnp.concatenate([jnp.zeros_like(x[..., :1, :]), x[..., :-1, :]], -2)
    mix = jax.nn.sigmoid(p["mix"])
    return (mix * x + (1 - mix) * before) @ p["out"]
""",
}
INITS = {
    "cross_attention": '{name: draw(rng, width, width) for name in "qkv"}',
    "mix_positions": '{"mix": draw(rng, SEQ, SEQ), "bias": draw(rng, width)}',
    "recurrence": '{"in": draw(rng, width, width), "out": draw(rng, width, width)}',
    "convolution": '{"kernel": draw(rng, 3, width, width), "bias": draw(rng, width)}',
    "token_shift": '{"mix": draw(rng, width), "out": draw(rng, width, width)}',
}


def need(draft: Draft, name: str) -> str:
    """Has a program define one of `FUNCTIONS`; gives its name."""
    draft.helpers[name] = FUNCTIONS[name].strip("\n")
    return name


def activation(draft: Draft) -> str:
    """Gives the activation's name."""
    name = ACTIVATIONS[draft.choices["activation"]]
    return name if "." in name else need(draft, name)


def norm(draft: Draft, x: str, place: str, leaves: dict[str, str], *, width: str = "width") -> str:
    """Writes a norm of x whose parameters, if any, are `place`, such as `p["norm1"]`."""
    kind = draft.choices["norm"]
    if kind == "no-norm":
        return x
    draft.helpers["norm"] = NORMS[kind].strip("\n")
    if kind.endswith("bare"):
        return f"norm({x})"
    name = place.split('"')[1]
    scale = f"1 + draw(rng, {width})"
    leaves[name] = (
        scale if kind == "rms-norm" else f'{{"scale": {scale}, "bias": draw(rng, {width})}}'
    )
    return f"norm({x}, {place})"


def attention(draft: Draft, arguments: list[str]) -> str:
    """Writes the function; gives the expression of its parameters."""
    kind, lines, init = (
        draft.choices["heads"],
        [],
        '{name: draw(rng, width, width) for name in "qkvo"}',
    )
    if kind == "einsum-heads":
        lines.append('q, k, v = (jnp.einsum("...td,dhk->...thk", x, p[name]) for name in "qkv")')
        each = "draw(rng, width, HEADS, width // HEADS)"
        init = f'{{**{{name: {each} for name in "qkv"}}, "o": draw(rng, width, width)}}'
    else:
        need(draft, "split_heads")
    if kind == "separate-qkv":
        lines.append('q, k, v = (split_heads(x @ p[name]) for name in "qkv")')
    elif kind == "fused-qkv":
        lines.append('q, k, v = (split_heads(a) for a in jnp.split(x @ p["qkv"], 3, -1))')
        init = '{"qkv": draw(rng, width, 3 * width), "o": draw(rng, width, width)}'
    elif kind == "multi-query":
        lines.append('q = split_heads(x @ p["q"])')
        lines.append('k, v = jnp.split((x @ p["kv"])[..., None, :], 2, -1)')
        lines.append("k, v = jnp.repeat(k, HEADS, -2), jnp.repeat(v, HEADS, -2)")
        init = (
            '{"q": draw(rng, width, width), "kv": draw(rng, width, 2 * (width // HEADS)), '
            '"o": draw(rng, width, width)}'
        )
    if draft.has("qk-norm"):
        lines.append(
            "q, k = (a / jnp.sqrt(jnp.sum(a**2, -1, keepdims=True) + 1e-6) for a in (q, k))"
        )
    if "cos" in arguments:
        need(draft, "rotate")
        lines.append("q, k = rotate(q, cos, sin), rotate(k, cos, sin)")
    values = "first" in arguments
    if values:
        lines.append("v = v if first is None else 0.5 * (v + first)")
    scale = "jnp.sqrt(q.shape[-1])" if draft.chance(0.5) else "q.shape[-1] ** 0.5"
    if draft.has("vmap-heads"):
        of_head = f'jnp.einsum("...qd,...kd->...qk", q, k) / {scale}'
        inner = [f"scores = {of_head}"]
        inner += ["scores = jnp.where(mask, scores, -1e9)"] * ("mask" in arguments)
        inner += ["return jax.nn.softmax(scores) @ v"]
        lines += ["", "def attend(q, k, v):", *(f"    {line}" for line in inner), ""]
        lines.append("y = jax.vmap(attend, in_axes=-2, out_axes=-2)(q, k, v)")
    else:
        lines.append(f'scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / {scale}')
        if "bias" in arguments:
            lines.append("scores = scores + bias")
        if "mask" in arguments:
            lines.append("scores = jnp.where(mask, scores, -1e9)")
        lines.append('y = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores, -1), v)')
    out = 'y.reshape(x.shape) @ p["o"]'
    lines.append(f"return {out}, v" if values else f"return {out}")
    head = f"def attention({', '.join(['p', 'x', *arguments])}):"
    draft.helpers["attention"] = "\n".join(
        [head, *(f"    {line}" if line else "" for line in lines)]
    )
    return init


def mlp(draft: Draft, kind: str) -> tuple[str, str]:
    """Writes an MLP's function; gives its name and the expression of its parameters."""
    act = activation(draft)
    if kind == "gated-mlp":
        name, body = "mlp", f'return ({act}(x @ p["gate"]) * (x @ p["up"])) @ p["down"]'
        wide = "draw(rng, width, 2 * width)"
        init = f'{{"gate": {wide}, "up": {wide}, "down": draw(rng, 2 * width, width)}}'
    elif kind == "plain-mlp":
        name, body = "mlp", f'return {act}(x @ p["up"]) @ p["down"]'
        init = '{"up": draw(rng, width, 2 * width), "down": draw(rng, 2 * width, width)}'
        if draft.chance(0.4):
            body = (
                f'h = {act}(x @ p["up"] + p["up_bias"])\n    return h @ p["down"] + p["down_bias"]'
            )
            init = init[:-1] + ', "up_bias": draw(rng, 2 * width), "down_bias": draw(rng, width)}'
    else:
        name = "experts"
        draft.sizes["EXPERTS"] = 3
        if draft.chance(0.5):
            lines = [
                'gates = jax.nn.softmax(x @ p["router"])',
                "chosen = jax.nn.one_hot(jnp.argmax(gates, -1), EXPERTS)",
                f'h = {act}(jnp.einsum("...d,edf->...ef", x, p["up"]))',
                'y = jnp.einsum("...ef,efd,...e->...d", h, p["down"], chosen * gates)',
            ]
        else:
            lines = [
                'gates = jax.nn.softmax(x @ p["router"], axis=-1)',
                "weight, best = lax.top_k(gates, 1)",
                "chosen = jax.nn.one_hot(best[..., 0], EXPERTS)",
                f'h = {act}(jnp.einsum("...d,...df->...f", x, p["up"][best[..., 0]]))',
                'y = weight * jnp.einsum("...f,...fd->...d", h, p["down"][best[..., 0]])',
            ]
        lines += [
            "load, share = (a.reshape(-1, EXPERTS).mean(0) for a in (chosen, gates))",
            "return y, EXPERTS * jnp.sum(load * share)",
        ]
        body = "\n    ".join(lines)
        init = (
            '{"router": draw(rng, width, EXPERTS), "up": draw(rng, EXPERTS, width, width), '
            '"down": draw(rng, EXPERTS, width, width)}'
        )
    draft.helpers[name] = f"def {name}(p, x):\n    {body}"
    return name, init
