"""A transformer's block and head -> FLOPs of their forward, input grad and weight grad.

Multiplications and additions of matmuls are counted, two for each entry of a product: a test counts
them in the jaxprs of such a block and its vjps. A lookup has none.
"""

from dataclasses import dataclass

import dualpipe_jax as dpj


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a pre-norm decoder, an MLP four times as wide, one sequence a microbatch."""

    layers: int
    width: int
    context: int
    heads: int
    vocabulary: int


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one microbatch: of a layer's F, I and W, and of the head's forward and gradients."""

    forward: int
    input_grad: int
    weight_grad: int
    head_forward: int
    head_backward: int

    def __str__(self) -> str:
        """Says them in a line."""
        return (
            f"FLOPs of a microbatch: of a layer F={self.forward:.4g}, I={self.input_grad:.4g}, "
            f"W={self.weight_grad:.4g}; of the head {self.head_forward:.4g} forwards and "
            f"{self.head_backward:.4g} backwards"
        )

    def costs(self, *, num_layers: int, num_ranks: int) -> dpj.Costs:
        """Gives them as costs of a rank's share of the layers, in those of a layer's forward."""
        share = num_layers / num_ranks / self.forward
        # `Costs` adds a backward to a head's forward, in the proportion of a layer's.
        backward = (self.input_grad + self.weight_grad) / self.forward
        head = (self.head_forward + self.head_backward) / (1 + backward)
        return dpj.Costs(
            forward=self.forward * share,
            input_grad=self.input_grad * share,
            weight_grad=self.weight_grad * share,
            head=head / self.forward,
        )


def count(sizes: Sizes) -> Flops:
    """Counts for a block and a head of these sizes."""
    tokens, width = sizes.context, sizes.width
    weights = 2 * tokens * 12 * width**2  # q, k, v, o; up and down of four widths
    # Scores, masked or not, and their product with v: two input grads each, and no weight grad.
    attention = 2 * 2 * tokens**2 * width
    head = 2 * tokens * width * sizes.vocabulary
    return Flops(
        forward=weights + attention,
        input_grad=weights + 2 * attention,
        weight_grad=weights,
        head_forward=head,
        head_backward=2 * head,
    )
