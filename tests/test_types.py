"""The shape comments of the state are executed: each field must have one, and it must be true."""

import dataclasses
import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import pytest
from story import config, ids

import paged_jax
from paged_jax import ledger as ledger_lib
from paged_jax import types as types_lib
from paged_jax.attention import tpu_write

COMMENT = re.compile(
  r"^  (\w+): jax\.Array(?: \| None = None)?  # (\w+)(?:\[(.*?)\])?(?:,? .*)?$", re.MULTILINE
)
CONFIG = config(num_pages=40, num_rows=5, num_layers=3)
AXES = dict(N=40, T=4, S=5, P=6, L=3, H=2, D=2, B=7, C=1, X=7, ceil=math.ceil)
DTYPES = dict(u32="uint32", i32="int32", bool="bool", storage="int8", f32="float32")


@functools.cache
def examples():
  """One value of each class, as shapes: nothing is computed, nothing compiled."""
  values = jax.eval_shape(states)
  return {type(value).__name__: value for value in values}


def states():
  cache = paged_jax.init(CONFIG)
  _, info, copies = ledger_lib.extend(cache.ledger, jnp.zeros(5, jnp.int32))
  tokens = jnp.zeros(7, jnp.int32), jnp.arange(7, dtype=jnp.int32)
  plan = paged_jax.plan(cache, *tokens)
  part = plan.parts[0]
  (windows,) = tpu_write.windows(cache.pages, plan.slots, part.block_size)
  _, image, _ = paged_jax.swap_out(cache, jnp.int32(0), num_pages=3)
  ledger = cache.ledger
  pages = paged_jax.init(dataclasses.replace(CONFIG, dtype="int8")).pages
  values = [ledger.pool, ledger.tables, pages, info, copies, plan, image]
  values += [part, part.blocks, windows]
  return [*values, paged_jax.audit(cache)]


def fields():
  for name, value in examples().items():
    source = inspect.getsource(type(value))
    arrays = [f for f, kind in type(value).__annotations__.items() if "Array" in str(kind)]
    comments = {match[1]: match for match in COMMENT.finditer(source)}
    for field in arrays:
      yield pytest.param(name, field, comments.get(field), id=f"{name}.{field}")


@pytest.mark.parametrize(("name", "field", "comment"), list(fields()))
def test_a_field_has_the_dtype_and_shape_of_its_comment(name, field, comment):
  assert comment is not None, f"{name}.{field} has no shape comment"
  value = getattr(examples()[name], field)
  assert value.dtype == DTYPES[comment[2]]
  if comment[3] is not None:
    dims = re.sub(r"(\d)([A-Z])", r"\1*\2", comment[3])
    axes = AXES | {"G": examples()["Blocks"].first.shape[0]}
    assert value.shape == tuple(eval(f"[{dims}]", axes))


def test_the_state_is_frozen_and_sizes_are_derived():
  cache = paged_jax.init(CONFIG)
  with pytest.raises(dataclasses.FrozenInstanceError):
    cache.pages = None  # pyright: ignore
  assert cache.ledger.pool.num_pages == 40
  assert (cache.ledger.num_rows, cache.ledger.pages_per_row, cache.ledger.capacity) == (5, 6, 24)


def test_state_classes_cover_the_module():
  state = {
    name for name, value in vars(types_lib).items()
    if inspect.isclass(value) and value.__module__ == types_lib.__name__
  }  # fmt: skip
  assert state == {*examples(), "Ledger", "Cache", "Log"}


def test_a_cache_has_few_leaves_because_each_costs_dispatch_time():
  assert len(jax.tree.leaves(paged_jax.init(CONFIG))) == 10
  assert ids(1).dtype == jnp.int32
