"""A transformer's sizes -> parameters, bytes of a layer and a microbatch, costs.

A layer is pre-norm, with an MLP four times as wide and no biases: q, k, v, o of width x width, up
and down of 4 width x width. It keeps the values that the library's split keeps of such a block (a
test compares them). In units of one x, tokens x width:

    remat     residual            weight_residual                    stash             deferred
    none      q, k, v   3         x, attention's output, their       cotangents:
                                  sum: 3; up: 4                      1 + 4 + 1 + 3     the same
    block     x         1         0                                  the same, and     x and its
                                                                     W's inputs: 7     cotangent: 2
"""

from dataclasses import dataclass

from dualpipe_jax._costs import Costs, of_transformer
from dualpipe_jax._errors import brief
from dualpipe_jax._predict.memory import LayerBytes

ATTENTIONS = ("fused", "plain")
REMATS = ("none", "block")
# The largest size: products of a few are still floats.
_MOST = 10**12


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Holds a language model's sizes.

    Attributes:
      layers: The layers of the model.
      width: The width of x.
      context: The tokens of a sequence.
      microbatch_size: The sequences of a microbatch, on one device.
      vocabulary: The tokens of the embedding and of the head, which are two matrices.
      heads: The heads of attention.
      attention: "fused", by a kernel that keeps no scores; or "plain", which keeps them, in
        float32.
      remat: As in `value_and_grad`: "none" or "block".
      activation_bytes: The bytes of an entry of x.

    Raises:
      ValueError: if a size is less than 1 or more than 10^12, naming all such; if heads do not
        divide the width, or there is no such attention or remat.
    """

    layers: int
    width: int
    context: int
    microbatch_size: int
    vocabulary: int
    heads: int
    attention: str = "fused"
    remat: str = "none"
    activation_bytes: int = 2

    def __post_init__(self) -> None:
        sizes = {name: v for name, v in vars(self).items() if isinstance(v, int)}
        if wrong := [f"{name}={brief(v)}" for name, v in sizes.items() if not 1 <= v <= _MOST]:
            raise ValueError(
                f"{', '.join(wrong)}: a size must be at least 1, and at most {_MOST:,}"
            )
        if self.width % self.heads:
            raise ValueError(
                f"heads={self.heads}: must divide width={self.width} into equal parts; "
                "change one of the two"
            )
        for name, known in (("attention", ATTENTIONS), ("remat", REMATS)):
            if getattr(self, name) not in known:
                names = ", ".join(map(repr, known))
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {names}")

    @property
    def tokens(self) -> int:
        """Counts the tokens of a microbatch."""
        return self.microbatch_size * self.context

    @property
    def layer_parameters(self) -> int:
        """Counts the parameters of a layer: 12 width^2, and two norms."""
        return 12 * self.width**2 + 2 * self.width

    @property
    def layer_flops(self) -> int:
        """Counts the FLOPs of a layer's forward of one microbatch: two for a multiplication."""
        return 2 * self.tokens * (12 * self.width**2 + 2 * self.context * self.width)

    @property
    def ends_parameters(self) -> int:
        """Counts the parameters of embedding, head and a norm."""
        return 2 * self.vocabulary * self.width + self.width

    @property
    def layer_bytes(self) -> LayerBytes:
        """Counts the bytes that one layer keeps of one microbatch."""
        x = self.tokens * self.width * self.activation_bytes
        scores = 0
        if self.attention == "plain":
            scores = self.microbatch_size * self.heads * self.context**2 * 4
        residual, weight_residual, cotangents, inputs = 3 * x + scores, 7 * x, 9 * x, 7 * x
        # The head's logits and their cotangent, in float32.
        logits = 2 * 4 * self.tokens * self.vocabulary
        if self.remat == "none":
            return LayerBytes(
                x=x,
                residual=residual,
                weight_residual=weight_residual,
                stash=cotangents,
                deferred=cotangents,
                working=logits,
            )
        return LayerBytes(
            x=x,
            residual=x,
            weight_residual=0,
            stash=cotangents + inputs,
            deferred=2 * x,
            # A layer is recomputed where there are no logits, or after them.
            working=max(logits, residual + weight_residual),
        )

    def costs(self, num_ranks: int) -> Costs:
        """Makes costs from multiplications, in forwards of a rank's share of the layers.

        Under remat I runs the forward again, and a deferred W forward and input grad. Fused, I and
        W take a tenth less than split.

        >>> sizes = dict(layers=8, width=2, context=6, microbatch_size=1, vocabulary=9, heads=1)
        >>> Transformer(**sizes).costs(num_ranks=4)
        Costs(forward=1.0, input_grad=1.333..., weight_grad=0.666..., embed=0.0, head=0.125, ...)
        """
        of_weights = 12 * self.width**2
        of_attention = 2 * self.context * self.width
        forward = of_weights + of_attention
        return of_transformer(
            attention=of_attention / forward,
            recomputes=self.remat == "block",
            head=self.vocabulary * self.width / (self.layers / num_ranks * forward),
        )
