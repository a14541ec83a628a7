"""Weights on a mesh: the same values, each device with its part, read from the files part by part."""

import jax
import numpy as np
import pytest
import tiny_models
from flax import nnx
from jax.sharding import AxisType
from test_parity import GOLDENS

from paged_jax import models
from paged_jax.models import tensors


def mesh(ways):
  kinds = (AxisType.Auto,)
  return jax.make_mesh((ways,), ("model",), axis_types=kinds, devices=jax.devices()[:ways])


def leaves(model):
  return [(path, leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))]


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_a_model_on_a_mesh_has_the_weights_of_the_checkpoint(name):
  whole, split = models.load(GOLDENS / name), models.load(GOLDENS / name, mesh=mesh(2))
  assert split.config == whole.config
  for (path, want), (_, got) in zip(leaves(whole), leaves(split), strict=True):
    np.testing.assert_array_equal(got, want, str(path))
    assert got.dtype == want.dtype and len(got.sharding.device_set) == 2


def test_every_device_has_its_part_of_the_large_weights_and_reads_no_more(monkeypatch):
  read, sizes = tensors.read, []

  def counted(tensor, index, dtype):
    part = read(tensor, index, dtype)
    sizes.append(part.size / np.prod(tensor.shape))
    return part

  monkeypatch.setattr(tensors, "read", counted)
  parts = {path[-2:]: x for path, x in leaves(models.load(models.embedded(), mesh=mesh(2)))}
  assert set(sizes) == {0.5, 1.0}
  for module in ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "embed_tokens"):
    x = parts[module, "weight"]
    assert x.addressable_shards[1].data.size * 2 == x.size, module
  norm = parts["input_layernorm", "weight"]
  assert norm.sharding.is_fully_replicated


def test_key_projections_of_fewer_heads_than_devices_are_on_each():
  # The embedded model has 6 query heads and 2 KV heads.
  parts = {path[-2:]: x for path, x in leaves(models.load(models.embedded(), mesh=mesh(3)))}
  assert parts["k_proj", "weight"].sharding.is_fully_replicated
  assert not parts["q_proj", "weight"].sharding.is_fully_replicated


def test_a_mesh_that_does_not_fit_the_model_is_refused():
  with pytest.raises(ValueError, match="4 devices of mesh axis 'model' do not divide the 6 query"):
    models.load(models.embedded(), mesh=mesh(4))
  with pytest.raises(ValueError, match=r"axis must be one of \['model'\], got 'x'"):
    models.load(models.embedded(), mesh=mesh(2), axis="x")
