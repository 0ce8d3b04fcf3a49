"""The lines after the layers: the head, the loss, losses of layers, metrics."""

from experiments.fuzz_losses import pieces
from experiments.fuzz_losses.draft import IN_PYTHON, Draft, Out

OF_TOKENS = ("cross-entropy", "logsumexp", "one-hot", "label-smoothing", "masked-loss")
STATES = ("weighted-states", "mean-of-states", "max-of-states", "norm-of-states")


def add_outs(draft: Draft) -> None:
    """Draws the values of each layer that the extras need."""
    if draft.has(*STATES, "early-exit"):
        draft.outs.append(Out(name="x", many="states", expression="x", way="listed"))
    if draft.has("activation-penalty"):
        way = draft.choices["auxiliary"]
        mean = "jnp.mean(jnp.square(x))"
        draft.outs.append(Out(name="penalty", many="penalties", expression=mean, way=way))
    if draft.has("hint-losses"):
        draft.batch["hints"] = "rng.standard_normal((rows, LAYERS, WIDTH))"
        hint = 'jnp.mean(jnp.square(x.mean(-2) - batch["hints"][..., i, :]))'
        way = draft.choices["auxiliary"]
        draft.outs.append(Out(name="hint", many="hints", expression=hint, way=way))
    if draft.has("metrics-by-layer", "metric-mean", "metric-max"):
        size = draft.one_of({"jnp.sqrt(jnp.mean(x**2))": 1.0, "jnp.abs(x).max()": 0.6})
        draft.outs.append(Out(name="size", many="sizes", expression=size, way="listed"))


def write_states(draft: Draft) -> list[str]:
    """Writes the output as a value of all layers' outputs, where an extra says so."""
    stacked = "jnp.stack(states)" if draft.form in IN_PYTHON else "states"
    if draft.has("weighted-states"):
        draft.ends["mix"] = "draw(rng, LAYERS)"
        if draft.form in IN_PYTHON and draft.chance(0.5):
            return [
                'weights = jax.nn.softmax(params["mix"])',
                "x = sum(weight * state for weight, state in zip(weights, states))",
            ]
        return [f'x = jnp.tensordot(jax.nn.softmax(params["mix"]), {stacked}, 1)']
    if draft.has("mean-of-states"):
        if draft.form in IN_PYTHON and draft.chance(0.5):
            return ["x = sum(states) / len(states)"]
        return [f"x = jnp.mean({stacked}, 0)"]
    if draft.has("max-of-states"):
        return [f"x = jnp.max({stacked}, 0)"]
    if draft.has("norm-of-states"):
        return [f"x = jnp.sqrt(jnp.sum(jnp.square({stacked}), 0))"]
    return []


def write_loss(draft: Draft) -> list[str]:
    """Writes the lines from the last stream x to `loss`."""
    kind, width = draft.choices["loss"], "WIDE" if draft.has("two-widths") else "WIDTH"
    leaves: dict[str, str] = {}
    lines = []
    last = pieces.norm(draft, "x", 'params["final_norm"]', leaves, width=width)
    draft.ends |= leaves
    if kind in ("regression", "huber"):
        draft.batch["target"] = "rng.standard_normal((rows, SEQ, 2))"
        draft.ends["head"] = f"draw(rng, {width}, 2)"
        lines.append(f'difference = {last} @ params["head"] - batch["target"]')
        if kind == "huber":
            small = "0.5 * jnp.square(difference), jnp.abs(difference) - 0.5"
            return [*lines, f"loss = jnp.where(jnp.abs(difference) < 1, {small}).mean()"]
        return [*lines, "loss = jnp.mean(jnp.square(difference))"]
    if kind == "contrastive":
        draft.batch["view"] = "rng.standard_normal((rows, 3))"
        draft.ends["view"] = f"draw(rng, 3, {width})"
        return [
            f'one, other = {last}.mean(-2), batch["view"] @ params["view"]',
            "one, other = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (one, other))",
            "logits = one @ other.T / 0.5",
            "loss = -jnp.mean(jnp.diag(jax.nn.log_softmax(logits)))",
        ]
    if kind == "classification":
        draft.batch["label"] = "rng.integers(0, VOCAB, rows)"
        draft.ends["head"] = f"draw(rng, {width}, VOCAB)"
        draft.ends["head_bias"] = "draw(rng, VOCAB)"
        pooled = f"{last}.mean(-2)" if draft.chance(0.6) else f"{last}[..., -1, :]"
        return [
            f"pooled = {pooled}",
            'logits = pooled @ params["head"] + params["head_bias"]',
            'labels = batch["label"]',
            *_cross_entropy(draft, "cross-entropy"),
        ]
    if draft.has("tied"):
        head = 'params["embed"].T'
    else:
        head = 'params["head"]'
        draft.ends["head"] = f"draw(rng, {width}, VOCAB)"
    if draft.has("early-exit"):
        return _early_exits(draft, head)
    shifts = "tokens" in draft.batch and draft.chance(0.6)
    logits = f"{last} @ {head}"
    if draft.has("logit-cap"):
        logits = f"5 * jnp.tanh({logits} / 5)"
    lines.append(f"logits = {logits}")
    if shifts:
        lines += ["logits = logits[..., :-1, :]", 'labels = batch["tokens"][..., 1:]']
    else:
        draft.batch["labels"] = "rng.integers(0, VOCAB, (rows, SEQ))"
        lines.append('labels = batch["labels"]')
    if kind == "masked-loss":
        if "valid" not in draft.batch:
            draft.batch["weights"] = "rng.integers(1, 3, (rows, SEQ)) / 2"
        weights = 'batch["weights"]' if "weights" in draft.batch else 'batch["valid"]'
        lines.append(f"weights = {weights}" + "[..., 1:]" * shifts)
    lines += _cross_entropy(draft, kind)
    if draft.has("z-loss"):
        lines.append("loss = loss + 1e-2 * jnp.mean(jnp.square(jax.nn.logsumexp(logits, -1)))")
    if draft.has("second-head"):
        draft.ends["second"] = f"draw(rng, {width}, {width})"
        draft.batch.setdefault("labels", "rng.integers(0, VOCAB, (rows, SEQ))")
        lines += [
            f'second = jax.nn.log_softmax((x @ params["second"]) @ {head})[..., :-1, :]',
            'after = batch["labels"][..., 1:]',
            "picked = jnp.take_along_axis(second, after[..., None], -1)",
            "loss = loss - 0.3 * picked.mean()",
        ]
    return lines


def _early_exits(draft: Draft, head: str) -> list[str]:
    """Writes the head on every layer's output."""
    draft.batch["labels"] = "rng.integers(0, VOCAB, (rows, SEQ))"
    leaves: dict[str, str] = {}
    last = pieces.norm(draft, "x", 'params["final_norm"]', leaves, width="WIDTH")
    body = [
        "",
        "def exit_loss(x):",
        f"    logits = jax.nn.log_softmax({last} @ {head})",
        '    return -jnp.take_along_axis(logits, batch["labels"][..., None], -1).mean()',
        "",
    ]
    if draft.form in IN_PYTHON:
        return [
            *body,
            "loss = 0.0",
            "for i, state in enumerate(states):",
            "    loss = loss + (i + 1) / LAYERS * exit_loss(state)",
        ]
    return [*body, "loss = jax.vmap(exit_loss)(states) @ (jnp.arange(1, LAYERS + 1) / LAYERS)"]


def _cross_entropy(draft: Draft, kind: str) -> list[str]:
    """Writes the loss of logits and labels."""
    logs = "jax.nn.log_softmax(logits)"
    picked = "[..., None], -1)[..., 0]"
    if kind == "logsumexp":
        label = f"jnp.take_along_axis(logits, labels{picked}"
        lines = [f"nll = jax.nn.logsumexp(logits, -1) - {label}"]
    elif kind == "one-hot":
        lines = [f"nll = -jnp.sum(jax.nn.one_hot(labels, VOCAB) * {logs}, -1)"]
    elif kind == "label-smoothing":
        lines = [
            "soft = 0.9 * jax.nn.one_hot(labels, VOCAB) + 0.1 / VOCAB",
            f"nll = -jnp.sum(soft * {logs}, -1)",
        ]
    else:
        lines = [f"nll = -jnp.take_along_axis({logs}, labels{picked}"]
    if kind == "masked-loss":
        return [*lines, "loss = jnp.sum(nll * weights) / jnp.maximum(weights.sum(), 1)"]
    return [*lines, "loss = nll.mean()"]


def write_layers_losses(draft: Draft) -> list[str]:
    """Writes the lines that add losses of layers, and of parameters, to the loss."""
    lines = []
    for out in draft.outs:
        if out.name in ("balance", "penalty", "hint"):
            lines.append(f"loss = loss + 0.1 * {_reduced(draft, out)}")
    if draft.has("weight-decay", "weight-norm"):
        squares = "sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(params))"
        if draft.has("weight-norm"):
            squares = f"jnp.sqrt({squares})"
        lines.append(f"loss = loss + 1e-2 * {squares}")
    return lines


def _reduced(draft: Draft, out: Out) -> str:
    """Writes the sum or mean of a value over all layers."""
    if out.way == "weighted-sum" and not out.is_running:
        return f"{out.many} @ jnp.arange(1, LAYERS + 1) / LAYERS"
    if out.is_running:
        return f"{out.many} / LAYERS" if draft.chance(0.4) else out.many
    if draft.form not in IN_PYTHON:
        return f"{out.many}.{'mean' if out.way == 'listed-mean' else 'sum'}()"
    if out.way == "listed-sum":
        return f"sum({out.many})"
    whole = f"jnp.mean(jnp.stack({out.many}))"
    return whole if draft.chance(0.6) else f"sum({out.many}) / len({out.many})"


def write_metrics(draft: Draft, lines: list[str]) -> str:
    """Gives the expression of the metrics, for a loss with these lines; "" if there are none."""
    if not draft.has("has-aux"):
        return ""
    metrics = {"loss": "loss"}
    if any(line.startswith("nll") for line in lines):
        metrics["nll"] = "nll.mean()"
        metrics["accuracy"] = draft.one_of(
            {
                "(logits.argmax(-1) == labels).mean()": 2.0,
                "jnp.sum(jnp.argmax(logits, -1) == labels)": 1.0,
            }
        )
    stacked = "jnp.stack(sizes)" if draft.form in IN_PYTHON else "sizes"
    if draft.has("metrics-by-layer"):
        metrics["sizes"] = stacked
    if draft.has("metric-mean"):
        metrics["mean_size"] = f"{stacked}.mean()"
    if draft.has("metric-max"):
        metrics["max_size"] = f"{stacked}.max()"
    for out in draft.outs:
        if out.name in ("balance", "penalty", "hint") and draft.chance(0.5):
            metrics[out.name] = _reduced(draft, out)
    chosen = [f'"{name}": {value}' for name, value in metrics.items()]
    return f"{{{', '.join(chosen)}}}"
