"""The features of the grammar: the options of each slot, and the extras, with their weights.

A program has one option of each slot; an option's weight is its share among those that the rest of
the program allows. Each extra comes with its own probability, in percent.
"""

SLOTS: dict[str, dict[str, tuple[float, str]]] = {
    "layers": {
        "names": (16, 'a Python loop over `params[f"layer_{i}"]`'),
        "list": (16, 'a Python loop over a list of dicts, `params["blocks"]`'),
        "nested": (9, 'a Python loop over `params["params"]["decoder"][f"layers_{i}"]`'),
        "scan": (27, "`lax.scan` over a stack"),
        "scan-unrolled": (4, "`lax.scan` over a stack with `unroll=2`"),
        "scan-groups": (5, "a stack reshaped to groups of layers, a scan in a scan"),
        "scan-after-first": (4, "the first row of a stack by itself, a scan over the others"),
        "scan-halves": (5, "two scans, each over a half of a stack"),
        "scan-indices": (5, "`lax.scan` over `jnp.arange(LAYERS)` that indexes the stack"),
        "fori-index": (5, "`lax.fori_loop` with `a[i]` of every leaf of the stack"),
        "fori-dynamic": (5, "`lax.fori_loop` with `lax.dynamic_index_in_dim`"),
        "stack-indexed": (6, "a Python loop with `a[i]` of every leaf of the stack"),
        "stack-listed": (5, "a list of the rows of a stack, made ahead of the loop"),
        "stack-split": (5, "`jnp.split` of the stack ahead of the loop"),
        "stack-iterated": (3, "a Python loop over the stack itself, `for w in stack`"),
    },
    "block": {
        "transformer": (56, "attention and an MLP"),
        "mlp-only": (14, "an MLP"),
        "mixer": (7, "a mixing of positions by a matrix and an MLP"),
        "recurrent": (9, "an inner scan over time with a decay by layer, and an MLP"),
        "convolution": (6, "a convolution over positions and an MLP"),
        "token-shift": (6, "a learned mix with the position before, and an MLP"),
    },
    "residual": {
        "pre-norm": (46, "`x + f(norm(x))`"),
        "post-norm": (12, "`norm(x + f(x))`"),
        "sandwich": (7, "`x + norm(f(norm(x)))`"),
        "parallel": (9, "all branches on one norm: `x + f(h) + g(h)`"),
        "no-residual": (6, "`f(norm(x))`"),
    },
    "streams": {
        "one-stream": (89, "one residual stream"),
        "reversible": (6, "two streams, `y = y + f(x)`, `x = x + g(y)`"),
        "swapped": (6, "two streams that change places after each layer"),
        "hyper-connections": (6, "several copies of the stream, mixed by each layer"),
    },
    "norm": {
        "rms-norm": (38, "RMS norm with a scale"),
        "layer-norm": (34, "layer norm with scale and bias"),
        "rms-norm-bare": (9, "RMS norm without parameters"),
        "layer-norm-bare": (7, "layer norm without parameters"),
        "no-norm": (8, "no norm"),
    },
    "mlp": {
        "plain-mlp": (52, "two matrices"),
        "gated-mlp": (34, "three matrices, a gate"),
        "experts": (9, "a mixture of experts with top-1 routing"),
    },
    "activation": {
        "gelu": (34, "`jax.nn.gelu`"),
        "silu": (26, "`jax.nn.silu`"),
        "relu": (18, "`jax.nn.relu`, a `custom_jvp`"),
        "tanh": (8, "`jnp.tanh`"),
        "own-custom-jvp": (6, "a `custom_jvp` of the model's own"),
        "squared-relu": (5, "`jnp.square(jax.nn.relu(x))`"),
        "softmax-activation": (5, "`jax.nn.softmax` over the hidden units"),
    },
    "heads": {
        "separate-qkv": (52, "a matrix each for q, k and v"),
        "fused-qkv": (24, "one matrix for q, k and v, split"),
        "multi-query": (10, "one head of keys and values for all heads of queries"),
        "einsum-heads": (14, "matrices `[width, heads, size]` in einsums"),
    },
    "mask": {
        "causal": (46, "a causal mask"),
        "causal-padding": (14, "a causal mask and padding from the batch"),
        "padding": (9, "padding from the batch"),
        "segments": (6, "a causal mask within segments of the batch"),
        "window-by-layer": (6, "a sliding window whose size is a literal of each layer"),
        "local-global": (6, "a local and a global mask by turns"),
        "no-mask": (13, "no mask"),
    },
    "positions": {
        "learned-positions": (28, "a learned table, added to the input"),
        "sinusoids": (10, "sines and cosines, added to the input"),
        "rotary": (20, "rotary tables, computed once"),
        "rotary-in-layer": (7, "rotary tables, computed in each layer"),
        "rotary-by-layer": (7, "rotary tables with a base by layer"),
        "alibi": (8, "ALiBi's slopes"),
        "relative-bias": (6, "a learned table of relative positions outside of the layers"),
        "no-positions": (22, "none"),
    },
    "input": {
        "tied": (26, "tokens; the head is the embedding's transpose"),
        "untied": (40, "tokens; a head of its own"),
        "projected": (17, "floats through an input projection"),
        "direct": (8, "floats that the first layer takes as they are"),
    },
    "loss": {
        "cross-entropy": (40, "`log_softmax` and `take_along_axis`"),
        "logsumexp": (14, "logsumexp minus the label's logit"),
        "one-hot": (9, "one-hot labels times `log_softmax`"),
        "label-smoothing": (6, "smoothed labels"),
        "masked-loss": (13, "a mean over the positions that the batch marks"),
        "regression": (14, "squared differences to a target"),
        "huber": (4, "a Huber loss to a target"),
        "classification": (9, "one label a row, from pooled positions"),
        "contrastive": (5, "a row's similarity to its own view and those of other rows"),
    },
    "precision": {
        "as-stored": (84, "parameters as they are stored"),
        "cast-first": (9, "`tree.map(astype)` over all parameters ahead of everything"),
        "cast-in-layer": (6, "each layer casts its parameters"),
    },
    "wrapping": {
        "unwrapped": (68, "layers called as they are"),
        "checkpoint": (12, "`jax.checkpoint` around each layer"),
        "checkpoint-policy": (5, "`jax.checkpoint` with a policy around each layer"),
        "checkpoint-pairs": (11, "`jax.checkpoint` around two layers"),
        "jit-layer": (6, "`jax.jit` around each layer"),
        "jit-model": (5, "`jax.jit` around the whole loss"),
    },
    "rows": {
        "batched": (92, "the model takes a batch"),
        "vmap": (8, "`jax.vmap` of a model of one row"),
    },
    "keys": {
        "fold-in": (42, "`fold_in(rng, i)`"),
        "split": (36, "`split(rng, LAYERS)[i]`"),
        "chain": (18, "`rng, key = split(rng)` in each layer"),
    },
    "auxiliary": {
        "running-sum": (44, "losses of layers in a running sum, or a scan's carry"),
        "listed-sum": (26, "losses of layers in a list or a scan's ys, then their sum"),
        "listed-mean": (26, "losses of layers in a list or a scan's ys, then their mean"),
        "weighted-sum": (16, "losses of layers, each times a literal of its layer"),
    },
}

EXTRAS: dict[str, tuple[float, str]] = {
    "dropout": (13, "dropout of the branches"),
    "input-dropout": (4, "dropout of the input"),
    "stochastic-depth": (4, "a whole branch dropped, with a rate by layer"),
    "noise": (3, "Gaussian noise on the stream"),
    "layer-scale": (4, "a learned vector times each branch"),
    "depth-scale": (5, "a literal `1 / (i + 1)` times each branch"),
    "rezero": (3.5, "a learned scalar times each branch"),
    "gradient-scale": (4, "a `custom_vjp` that scales gradients by a literal of each layer"),
    "straight-through": (4, "a `custom_vjp` that rounds, and passes gradients on"),
    "batch-cond": (4, "`lax.cond` on a value of the batch"),
    "batch-switch": (3.5, "`lax.switch` on a value of the batch"),
    "index-cond": (4, "two branches by `i % 2`, `lax.cond` where the index is traced"),
    "stop-gradient": (4, "`lax.stop_gradient` in each layer"),
    "frozen-embedding": (3, "`lax.stop_gradient` of the embedding"),
    "embedding-scale": (6, "the embedding times the root of the width"),
    "qk-norm": (5, "queries and keys normalised"),
    "vmap-heads": (3.5, "`jax.vmap` over heads"),
    "token-table-by-layer": (4, "a table of tokens for each layer, outside of the layers"),
    "bias-by-layer": (4, "a bias for each layer, outside of the layers"),
    "shared-adapter": (4, "a matrix outside of the layers that all layers use"),
    "table-in-first": (3.5, "a bias in the first layer that all layers use (`shared=`)"),
    "film": (5, "a time embedding of the batch that scales and shifts in all layers"),
    "encoder": (6, "cross-attention onto an encoder that ran before"),
    "two-widths": (4, "two groups of layers of different widths, a projection between"),
    "attention-mlp-turns": (4, "layers of attention and of an MLP by turns"),
    "dense-expert-turns": (3.5, "dense layers and layers of experts by turns"),
    "dense-first": (3.5, "a dense layer, then layers of experts"),
    "u-net": (4, "the second half adds the outputs of the first"),
    "first-skip": (4, "the first layer's output, added in all later ones"),
    "value-residual": (4, "the first layer's values, used by all later ones"),
    "input-skip": (4, "the embedding, added in all layers"),
    "dense-mean": (3.5, "each layer takes the mean of all outputs before"),
    "frozen-layers": (3.5, "`lax.stop_gradient` of the first layers' parameters"),
    "hint-losses": (3.5, "a loss of each layer's output to the batch's own target for it"),
    "weighted-states": (3.5, "the output is a learned sum over all layers' outputs"),
    "mean-of-states": (3, "the output is the mean over all layers' outputs"),
    "max-of-states": (3, "the output is the maximum over all layers' outputs"),
    "norm-of-states": (3, "the output is the root of the sum of all outputs' squares"),
    "early-exit": (4, "the head on every layer's output, weighted"),
    "activation-penalty": (5, "a penalty on the activations of each layer"),
    "z-loss": (4, "a penalty on the logits' logsumexp"),
    "weight-decay": (6, "the sum of squares of all parameters"),
    "weight-norm": (3, "the root of the sum of squares of all parameters"),
    "second-head": (4, "a second head that predicts two ahead"),
    "logit-cap": (4, "tanh around the logits"),
    "has-aux": (34, "metrics of the head beside the loss"),
    "metrics-by-layer": (7, "a metric with a row for each layer"),
    "metric-mean": (4, "a metric that is the mean over layers"),
    "metric-max": (4, "a metric that is the maximum over layers"),
}


def names() -> list[str]:
    """Names all features, an option as `slot/option`."""
    return [f"{slot}/{option}" for slot, options in SLOTS.items() for option in options] + list(
        EXTRAS
    )


def markdown() -> str:
    """Writes the grammar: a line for each feature, with its weight."""
    lines = ["| slot | feature | weight |  |\n| --- | --- | ---: | --- |\n"]
    for slot, options in SLOTS.items():
        total = sum(weight for weight, _ in options.values())
        for option, (weight, text) in options.items():
            lines.append(f"| {slot} | {option} | {100 * weight / total:.0f} % | {text} |\n")
    for name, (percent, text) in EXTRAS.items():
        lines.append(f"| extra | {name} | {percent:g} % | {text} |\n")
    return "".join(lines)
