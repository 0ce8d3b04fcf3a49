"""The host's memory in which `choose` may leave activations, and how long copies to it take."""

from dataclasses import dataclass

from dualpipe_jax._devices import V5E, find_device
from dualpipe_jax._errors import brief
from dualpipe_jax._executor import Work
from dualpipe_jax._leaves.explicit_axes import device_kind_of
from dualpipe_jax._model.types import Mesh
from dualpipe_jax._predict import Costs
from dualpipe_jax._sizes import as_host_memory, require_rate


@dataclass(frozen=True, kw_only=True)
class Host:
    """Holds the memory of the host, the link to it, and the peak of the device beside it.

    Attributes:
      memory: The host's memory for each device, in bytes; 0 if no activation may wait there.
      link: Bytes a second between a device and its host, each way; None if it is not known.
      peak_flops: FLOPs a second of a device, at which a model's work becomes seconds.
    """

    memory: float
    link: float | None
    peak_flops: float

    @classmethod
    def of(cls, mesh: Mesh, *, memory: object, link: float | None, costs: Costs | None) -> "Host":
        """Checks the arguments of `choose`, and finds the figures of the mesh's devices.

        Raises:
          ValueError: If the memory is no size, or how long copies take is not known.
          TypeError: If an argument has a wrong type.
        """
        num_bytes = as_host_memory("host_memory", memory)
        require_rate("host_link", link)
        device = find_device(device_kind_of(mesh))
        if link is None and device is not None:
            link = device.host_link
        if num_bytes and link is None and not _has_copies(costs):
            raise ValueError(
                "host_link=None: must be the bytes a second between a device and its host, each "
                "way, such as 32e9, as the figures of the mesh's devices are not known"
            )
        return cls(memory=num_bytes, link=link, peak_flops=(device or V5E).peak_flops)

    def lacks_times(self, costs: Costs | None) -> bool:
        """Whether copies are possible, and costs do not say how long they take."""
        return bool(self.memory) and not _has_copies(costs)

    def with_copies(self, costs: Costs, work: Work, *, num_ranks: int) -> Costs:
        """Adds how long copies take to costs of a step with this work.

        Raises:
          ValueError: If that work is not known, or the copies take too long for a cost.
        """
        assert self.link is not None
        layers = work.all_layers
        if not layers.forward:
            raise ValueError(
                f"host_memory={brief(self.memory)}: must come with costs=dpj.Costs(spill=, fill=), "
                "how long an activation is copied, as the layers have no matmuls to compare it with"
            )
        return costs.with_copies(
            costs.activation_bytes or layers.activation_bytes / num_ranks,
            flops=layers.forward / num_ranks,
            host_link=self.link,
            peak_flops=self.peak_flops,
        )


def _has_copies(costs: Costs | None) -> bool:
    return costs is not None and bool(costs.spill or costs.fill)
