"""Splits the backward of a block into an input gradient and a weight gradient."""

from dualpipe_jax._split_vjp.cost import contraction_flops as contraction_flops
from dualpipe_jax._split_vjp.cost import is_look_up as is_look_up
from dualpipe_jax._split_vjp.cost import time_in_flops as time_in_flops
from dualpipe_jax._split_vjp.split import SplitVjp as SplitVjp
from dualpipe_jax._split_vjp.split import split_vjp as split_vjp
from dualpipe_jax._split_vjp.trace import capture as capture
from dualpipe_jax._split_vjp.trace import is_differentiable as is_differentiable
from dualpipe_jax._split_vjp.trace import traced_once as traced_once
