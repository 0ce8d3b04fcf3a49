"""The host's memory in which `choose` may leave activations, as the command's options say."""

from dataclasses import dataclass

from dualpipe_jax._cli.refusal import Refusal
from dualpipe_jax._costs import format_bytes
from dualpipe_jax._devices import V5E, Device
from dualpipe_jax._predict import Costs, LayerBytes, Transformer


@dataclass(frozen=True, kw_only=True)
class Host:
    """Holds the host's memory for each device, the link to it, and the device beside it."""

    memory: float
    link: float | None
    device: Device

    @classmethod
    def of(cls, memory: float, link: float | None, device: Device | None) -> "Host":
        """Makes it of the options, and of the device that they name.

        Raises:
          Refusal: if there is memory, and the link to it is not known.
        """
        if link is None and device is not None:
            link = device.host_link
        if memory and link is None:
            raise Refusal(
                f"--host-memory {format_bytes(memory)}: must come with --host-link, such as "
                "32GB/s, or with the --device, whose link is known"
            )
        return cls(memory=memory, link=link, device=device or V5E)

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures that decide about copies; none if there are no copies."""
        if not self.memory:
            return {}
        peak = self.device.peak_flops
        return {"host_memory": self.memory, "host_link": self.link, "peak_flops": peak}

    @property
    def notes(self) -> tuple[str, ...]:
        """The lines below a table that say so."""
        if not self.memory:
            return ()
        rate, peak = (self.link or 0) / 1e9, self.device.peak_flops / 1e12
        copies = "copies: between device and host, as far as compute does not hide them,"
        beside = f"compute at the {peak:.4g} TFLOPs a second of a {self.device.name}"
        return copies, f"over {rate:.3g} GB/s each way beside {beside}"

    def with_copies(
        self, costs: Costs, model: Transformer, layer: LayerBytes, *, num_ranks: int
    ) -> Costs:
        """Adds how long an activation is copied, if it may be."""
        if not self.memory:
            return costs
        assert self.link is not None
        share = model.layers / num_ranks
        return costs.with_copies(
            share * (layer.residual + layer.weight_residual),
            flops=share * model.layer_flops,
            host_link=self.link,
            peak_flops=self.device.peak_flops,
        )
