"""A step made over one mesh runs on the devices of the context's, if that has the same axes."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import dualpipe_jax as dpj
from tests.models import assert_close, make_batch, make_model, make_params


def mesh_over(devices: list[jax.Device], kind: AxisType, axis: str = "pipe") -> Mesh:
    return Mesh(np.array(devices), (axis,), axis_types=(kind,))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_mesh_of_the_context_takes_the_place_of_the_steps(kind: AxisType) -> None:
    ours, theirs = (mesh_over(d, kind) for d in (jax.devices()[:2], jax.devices()[2:4]))
    grad_fn = dpj.value_and_grad(make_model(), mesh=ours, num_microbatches=4)
    params, batch = make_params(4), make_batch(4)
    expected = grad_fn(params, batch)
    with jax.set_mesh(theirs):
        everywhere = NamedSharding(theirs, PartitionSpec())
        loss, grads = jax.jit(grad_fn)(*jax.device_put((params, batch), everywhere))
    assert grads["blocks"]["up"].sharding.device_set == set(theirs.devices.flat)
    assert_close(jax.device_get((loss, grads)), jax.device_get(expected))


def test_mesh_with_other_axes_does_not() -> None:
    ours = mesh_over(jax.devices()[:2], AxisType.Auto)
    others = mesh_over(jax.devices()[2:4], AxisType.Auto, axis="data")
    grad_fn = dpj.value_and_grad(make_model(), mesh=ours, num_microbatches=4)
    params, batch = make_params(4), make_batch(4)
    with jax.set_mesh(others), pytest.raises(ValueError, match="pipe"):
        jax.jit(grad_fn)(params, batch)
