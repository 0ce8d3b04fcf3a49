"""Draws the features of a program, so that they go together."""

import random

from experiments.fuzz_losses.draft import FORI, IN_PYTHON, OWN, Draft
from experiments.fuzz_losses.features import EXTRAS, SLOTS
from experiments.fuzz_losses.outputs import OF_TOKENS, STATES

PATTERNS = ("attention-mlp-turns", "dense-expert-turns", "dense-first")
SKIPS = ("u-net", "first-skip", "value-residual", "dense-mean")
# At most one of each line.
EXCLUSIVE = (
    (*SKIPS, "two-widths", "encoder"),
    (*PATTERNS, "value-residual", "two-widths"),
    (*STATES, "early-exit"),
    ("weight-decay", "weight-norm"),
    ("batch-cond", "batch-switch"),
    ("early-exit", "second-head"),
    ("early-exit", "z-loss"),
    ("early-exit", "logit-cap"),
    ("two-widths", *STATES, "early-exit"),
    *(
        ("two-widths", name)
        for name in ("input-skip", "shared-adapter", "bias-by-layer", "token-table-by-layer")
    ),
    ("two-widths", "table-in-first"),
    ("two-widths", "hint-losses"),
)
OF_LAYERS = ("metrics-by-layer", "metric-mean", "metric-max")


def choose(seed: int) -> Draft:
    """Draws the features of the program of a seed."""
    draft = Draft(random.Random(seed))
    extras = list(EXTRAS)
    draft.random.shuffle(extras)
    for extra in extras:
        others = {name for line in EXCLUSIVE if extra in line for name in line}
        if not others & draft.extras:
            draft.draw(extra)
    if draft.has(*OF_LAYERS):
        draft.extras.add("has-aux")
    _choose_layers(draft)
    _choose_model(draft)
    _choose_ends(draft)
    _choose_sizes(draft)
    draft.wraps_in_loop = draft.chance(0.5)
    draft.is_in_params = draft.form == "nested" and draft.chance(0.5)
    return draft


def _choose_layers(draft: Draft) -> None:
    """Draws how layers are stored and run."""
    forms = set(SLOTS["layers"])
    if draft.has(*SKIPS, "frozen-layers"):
        forms &= set(IN_PYTHON)
    if draft.has(*PATTERNS, "table-in-first"):
        forms &= set(OWN)
    if draft.has(*STATES, *OF_LAYERS, "early-exit"):
        forms -= set(FORI)
    if draft.has("hint-losses"):
        forms &= {*IN_PYTHON, *FORI, "scan", "scan-indices", "scan-unrolled"}
    draft.pick("layers", forms)
    if draft.has("two-widths") and draft.form not in IN_PYTHON:
        draft.extras -= set(OF_LAYERS)


def _choose_model(draft: Draft) -> None:
    """Draws a layer's parts."""
    attends = draft.has("qk-norm", "vmap-heads", "value-residual", "attention-mlp-turns")
    rows = draft.pick("rows", None, "vmap" if draft.has("batch-cond", "batch-switch") else "")
    if attends:
        draft.pick("block", ["transformer"])
    else:
        draft.pick("block", None, "convolution" if rows == "vmap" else "")
    one = draft.has(*SKIPS, "two-widths")
    many = draft.has(*STATES, "early-exit", *OF_LAYERS, "activation-penalty", "hint-losses")
    if one:
        draft.pick("streams", ["one-stream"])
    else:
        without = "hyper-connections" * many + " swapped" * draft.has(*STATES, "early-exit")
        single = draft.has("mlp-only") and not draft.has("encoder")
        without += " reversible" * (single or draft.has("attention-mlp-turns"))
        draft.pick("streams", None, without)
    streams = draft.choices["streams"]
    draft.pick("residual", None if streams == "one-stream" else ["pre-norm"])
    draft.pick("norm", None, "no-norm" if draft.has("sandwich", "post-norm") else "")
    if not draft.has("dense-expert-turns", "dense-first"):
        draft.pick("mlp")
    draft.pick("activation")
    if draft.has(
        "experts", "dense-expert-turns", "dense-first", "activation-penalty", "hint-losses"
    ):
        sums = draft.form in FORI or (draft.has("two-widths") and draft.form not in IN_PYTHON)
        draft.pick("auxiliary", ["running-sum"] if sums else None)
    if draft.has("transformer"):
        draft.pick("heads")
        draft.pick("mask")
        without = "alibi relative-bias " * draft.has("vmap-heads")
        without += "rotary rotary-in-layer rotary-by-layer" * draft.has("two-widths")
        draft.pick("positions", None, without)
    else:
        draft.pick("positions", ["learned-positions", "sinusoids", "no-positions"])
    pairs = draft.form in IN_PYTHON and not draft.has(
        *SKIPS,
        *STATES,
        *OF_LAYERS,
        "early-exit",
        "activation-penalty",
        "hint-losses",
        "experts",
        "frozen-layers",
        "dense-expert-turns",
        "dense-first",
        "two-widths",
    )
    draft.pick("wrapping", None, "" if pairs else "checkpoint-pairs")
    decays = draft.has("weight-decay", "weight-norm")
    draft.pick("precision", None, "cast-in-layer" * decays)


def _choose_ends(draft: Draft) -> None:
    """Draws the loss and the input."""
    if draft.has("early-exit"):
        draft.pick("loss", ["cross-entropy"])
    elif draft.has("z-loss", "second-head", "logit-cap"):
        draft.pick("loss", OF_TOKENS)
    else:
        draft.pick("loss", None, "contrastive" * draft.is_vmapped)
    untied = draft.choices["loss"] not in OF_TOKENS or draft.has("two-widths")
    tokens = draft.has("embedding-scale", "frozen-embedding", "token-table-by-layer")
    draft.pick("input", None, "tied " * untied + "projected direct" * tokens)


def _choose_sizes(draft: Draft) -> None:
    """Draws the sizes."""
    even = draft.has("checkpoint-pairs", "scan-groups")
    layers = {"4": 46, "6": 24, "2": 5, "8": 6, "5": 11, "3": 4}
    if draft.has("two-widths"):
        layers = {"2": 3, "3": 1}
    if even:
        layers = {n: share for n, share in layers.items() if int(n) % 2 == 0}
    sizes = draft.sizes
    sizes["LAYERS"] = int(draft.one_of(layers))
    turning = draft.choices["positions"].startswith("rotary")
    sizes["WIDTH"] = 4 if turning else draft.random.choice((4, 6))
    sizes["HEADS"], sizes["SEQ"], sizes["VOCAB"] = 2, draft.random.choice((4, 5)), 7
    if draft.has("two-widths"):
        sizes["WIDE"] = sizes["WIDTH"] + 2
    if draft.has("encoder"):
        sizes["ENCODER_LAYERS"] = draft.random.choice((2, 3))
