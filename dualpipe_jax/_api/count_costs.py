"""The work of a model's functions, and the bytes that they keep -> the costs of its actions."""

from dualpipe_jax._executor import Work
from dualpipe_jax._predict import FULL_BACKWARD, Costs


def costs_of(work: Work, *, num_ranks: int, unit: float | None = None) -> Costs | None:
    """Makes costs of counted work; None if the layers have none.

    Args:
      work: The work of a microbatch on one device.
      num_ranks: The ranks.
      unit: The work that costs 1; None for the forward of a rank's layers.
    """
    layers = work.all_layers
    if not layers.forward:
        return None
    share = 1 / (num_ranks * (unit or layers.forward / num_ranks))
    forward, input_grad, weight_grad, deferred = (
        share * flops
        for flops in (layers.forward, layers.input_grad, layers.weight_grad, layers.deferred)
    )
    of_kinds = {
        kind: float(each.forward + each.input_grad + each.weight_grad)
        for kind, each in work.layer.items()
    }
    return Costs.with_whole_ends(
        forward=forward,
        input_grad=input_grad,
        weight_grad=weight_grad,
        embed=num_ranks * share * work.embed,
        head=num_ranks * share * work.head,
        recompute=max(0.0, deferred - weight_grad),
        full_backward=FULL_BACKWARD * (input_grad + weight_grad),
        layer=of_kinds if len(set(of_kinds.values())) > 1 else None,
        activation_bytes=layers.activation_bytes / num_ranks or None,
        stash_bytes=layers.stash_bytes / num_ranks,
    )
