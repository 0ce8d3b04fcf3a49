"""The lines ahead of the layers: input, positions, masks, and values that all layers read."""

from experiments.fuzz_losses import pieces
from experiments.fuzz_losses.draft import IN_PYTHON, Draft, PerLayer
from experiments.fuzz_losses.layers import add_literal


def write_input(draft: Draft) -> None:
    """Writes the lines that make the first stream x of the batch."""
    kind, setup = draft.choices["input"], draft.setup
    if kind in ("tied", "untied"):
        draft.ends["embed"] = "draw(rng, VOCAB, WIDTH)"
        draft.batch["tokens"] = "rng.integers(0, VOCAB, (rows, SEQ))"
        table = 'params["embed"]'
        if draft.has("frozen-embedding"):
            table = f"lax.stop_gradient({table})"
        forms = {
            f'{table}[batch["tokens"]]': 6.0,
            f'jnp.take({table}, batch["tokens"], axis=0)': 2.0,
            f'jax.nn.one_hot(batch["tokens"], VOCAB) @ {table}': 1.0,
        }
        setup.append(f"x = {draft.one_of(forms)}")
        if draft.has("embedding-scale"):
            setup.append("x = x * WIDTH**0.5")
    elif kind == "projected":
        draft.sizes["FEATURES"] = 3
        draft.ends["project"] = "draw(rng, FEATURES, WIDTH)"
        draft.ends["project_bias"] = "draw(rng, WIDTH)"
        draft.batch["features"] = "rng.standard_normal((rows, SEQ, FEATURES))"
        setup.append('x = batch["features"] @ params["project"] + params["project_bias"]')
    else:
        draft.batch["x"] = "rng.standard_normal((rows, SEQ, WIDTH))"
        setup.append('x = batch["x"]')


def write_positions(draft: Draft) -> list[str]:
    """Writes the lines for positions; gives the arguments that attention takes for them."""
    kind = draft.choices["positions"]
    if kind == "learned-positions":
        draft.ends["positions"] = "draw(rng, SEQ, WIDTH)"
        table = 'params["positions"]' + ("[: x.shape[-2]]" if draft.chance(0.4) else "")
        draft.setup.append(f"x = x + {table}")
    elif kind == "sinusoids":
        draft.helpers["sinusoids"] = (
            "def sinusoids(length, width):\n"
            "    angles = jnp.arange(length)[:, None] / 10 ** (jnp.arange(width // 2) / width)\n"
            "    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)"
        )
        draft.setup.append("x = x + sinusoids(SEQ, WIDTH)")
    elif kind == "rotary":
        pieces.need(draft, "rotary")
        draft.setup.append("cos, sin = rotary(WIDTH // HEADS)")
        draft.close("cos", "sin")
    elif kind == "rotary-by-layer":
        layers = draft.sizes["LAYERS"]
        draft.constant("BASES", [10.0 if i % 2 == 0 else 50.0 for i in range(layers)])
        array = "jnp.array(BASES)"
        draft.per_layer.append(
            PerLayer(name="base", item="BASES[i]", stacked=array, traced=f"{array}[i]")
        )
    elif kind in ("alibi", "relative-bias"):
        if kind == "alibi":
            draft.setup += [
                "distance = jnp.abs(jnp.arange(SEQ)[:, None] - jnp.arange(SEQ))",
                "bias = -(2.0 ** -jnp.arange(1, HEADS + 1))[:, None, None] * distance",
            ]
        else:
            draft.ends["relative"] = "draw(rng, HEADS, 2 * SEQ - 1)"
            draft.setup += [
                "offsets = jnp.arange(SEQ)[:, None] - jnp.arange(SEQ) + SEQ - 1",
                'bias = params["relative"][:, offsets]',
            ]
        draft.close("bias")
        return ["bias"]
    return ["cos", "sin"] if kind.startswith("rotary") else []


def write_mask(draft: Draft) -> list[str]:
    """Writes the lines for the mask; gives the arguments that attention takes for it."""
    kind, setup = draft.choices["mask"], draft.setup
    if kind == "no-mask":
        return []
    of_heads = "" if draft.has("vmap-heads") else "None, "
    forms = {"jnp.tril(jnp.ones((SEQ, SEQ), bool))": 3.0}
    forms["jnp.arange(SEQ)[:, None] >= jnp.arange(SEQ)"] = 2.0
    if kind != "padding":
        setup.append(f"mask = {draft.one_of(forms)}")
    if kind in ("padding", "causal-padding"):
        draft.batch["valid"] = "np.arange(SEQ) < rng.integers(2, SEQ + 1, (rows, 1))"
        valid = f'batch["valid"][..., {of_heads}None, :]'
        setup.append(f"mask = {valid}" if kind == "padding" else f"mask = mask & {valid}")
    elif kind == "segments":
        draft.batch["segments"] = "np.sort(rng.integers(0, 2, (rows, SEQ)), -1)"
        setup.append('segments = batch["segments"]')
        same = f"segments[..., {of_heads}:, None] == segments[..., {of_heads}None, :]"
        setup.append(f"mask = mask & ({same})")
    elif kind == "window-by-layer":
        add_literal(draft, "window")
    elif kind == "local-global":
        near = "jnp.arange(SEQ)[:, None] - jnp.arange(SEQ) < 2"
        setup.append(f"local = mask & ({near})")
        if draft.form in IN_PYTHON and draft.chance(0.7):
            draft.per_layer.append(PerLayer(name="mask", item="local if i % 2 == 0 else mask"))
            return ["mask"]
        draft.close("local")
        flags = "jnp.arange(LAYERS) % 2 == 0"
        flags = flags if draft.chance(0.5) else None
        draft.per_layer.append(PerLayer(name="is_local", item="i % 2 == 0", stacked=flags))
    draft.close("mask")
    return ["mask"]


def write_input_dropout(draft: Draft) -> None:
    """Writes dropout of the stream ahead of the layers, if the program has it."""
    if draft.has("input-dropout"):
        dropout = pieces.need(draft, "dropout")
        if draft.chance(0.5):
            draft.setup.append("rng, key = jax.random.split(rng)")
            draft.setup.append(f"x = {dropout}(key, x)")
        else:
            draft.setup.append(f"x = {dropout}(jax.random.fold_in(rng, 1000), x)")


def write_shared(draft: Draft) -> None:
    """Writes the lines of the values that all layers read."""
    setup = draft.setup
    if draft.has("input-skip"):
        setup.append("x0 = x")
        draft.close("x0")
    if draft.has("film"):
        draft.batch["time"] = "rng.uniform(0, 1, rows)"
        draft.ends["time"] = "draw(rng, WIDTH, WIDTH)"
        setup += [
            'angles = batch["time"][..., None] * 2.0 ** jnp.arange(WIDTH // 2)',
            "time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)",
            'time = jax.nn.silu(time @ params["time"])',
        ]
        draft.close("time")
    if draft.has("shared-adapter"):
        draft.ends["adapter"] = "draw(rng, WIDTH, WIDTH)"
        setup.append('adapter = params["adapter"]')
        draft.close("adapter")
    if draft.has("batch-cond"):
        draft.batch["length"] = "rng.integers(0, 10, rows)"
        setup.append('is_long = batch["length"].mean() > 5')
        draft.close("is_long")
    if draft.has("batch-switch"):
        draft.batch["mode"] = "np.full(rows, 1 + rows % 2)"
        setup.append('mode = batch["mode"].max()')
        draft.close("mode")
    if draft.has("table-in-first"):
        draft.first_leaves["table"] = "draw(rng, SEQ, WIDTH)"
        draft.close("table")
    if draft.has("value-residual"):
        draft.close("first")
