"""How long actions take: `Costs`, and `StageLayers`, the layers of stages; sizes in bytes."""

from dualpipe_jax._costs.costs import FULL_BACKWARD as FULL_BACKWARD
from dualpipe_jax._costs.costs import TRANSFER as TRANSFER
from dualpipe_jax._costs.costs import Costs as Costs
from dualpipe_jax._costs.costs import as_number as as_number
from dualpipe_jax._costs.costs import of_transformer as of_transformer
from dualpipe_jax._costs.costs import require_cost as require_cost
from dualpipe_jax._costs.layers import StageLayers as StageLayers
from dualpipe_jax._costs.layers import cumulated as cumulated
from dualpipe_jax._costs.layers import require_layout as require_layout
from dualpipe_jax._costs.layers import weights_by_kind as weights_by_kind
from dualpipe_jax._sizes import as_bytes as as_bytes
from dualpipe_jax._sizes import format_bytes as format_bytes
from dualpipe_jax._sizes import parse_bytes as parse_bytes
