import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import attention

every_case = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
PORTABLE = ("reference", "xla")
every_implementation = pytest.mark.parametrize("implementation", PORTABLE)


def close(got, want, tolerance):
  got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
  np.testing.assert_allclose(got, want, tolerance, tolerance)


@every_case
@every_implementation
def test_output_and_lse_equal_the_definition_in_float64(case, implementation):
  problem = cases.build(case)
  out, lse = problem.attend(implementation)
  want_out, want_lse = cases.dense(case, problem)
  assert out.dtype == problem.q.dtype and lse.dtype == jnp.float32
  close(out, want_out, case.tolerance)
  close(lse, want_lse, case.tolerance)


PLAIN = [
  c for c in cases.CASES
  if c.softcap is None and not c.sinks and c.window is None and c.value_dim is None
]  # fmt: skip


@pytest.mark.parametrize("case", PLAIN[2::4], ids=lambda case: case.name)
def test_output_equals_dot_product_attention_on_gathered_keys(case):
  p = cases.build(case)
  live = np.asarray(p.plan.ok & (p.plan.rows < len(p.k)))
  rows = np.where(live, p.plan.rows, 0)
  j = np.arange(p.k.shape[1])[None]
  seen = (j <= np.asarray(p.plan.positions)[:, None]) & (
    j >= np.asarray(p.tables.starts)[rows, None]
  )
  want = jax.nn.dot_product_attention(
    np.asarray(p.q, np.float32)[:, None], p.k[rows], p.v[rows],
    mask=seen[:, None, None], scale=p.options["scale"],
  )[:, 0]  # fmt: skip
  out, _ = p.attend("xla")
  close(np.asarray(out)[live], np.asarray(want)[live], case.tolerance)


@every_implementation
@pytest.mark.parametrize("cut", [1, 7, 13])
def test_merge_of_earlier_and_later_keys_equals_attention_over_all(implementation, cut):
  p = cases.build(cases.Case("", (30, 25), (6, 1)))
  later = dataclasses.replace(p.tables, starts=jnp.full_like(p.tables.starts, cut))
  earlier = dataclasses.replace(p.plan, positions=jnp.full_like(p.plan.positions, cut - 1))
  out, lse = attention.merge(
    *p.attend(implementation, tables=later), *p.attend(implementation, plan=earlier)
  )
  want_out, want_lse = p.attend(implementation)
  close(out, want_out, 1e-5)
  close(lse, want_lse, 1e-5)


@every_implementation
def test_table_entries_outside_the_window_are_not_needed(implementation):
  case = cases.Case("", (1700, 600), (1, 2), window=20, page_size=16)
  p = cases.build(case)
  column = jnp.arange(p.tables.block_tables.shape[1])[None]
  first = (p.tables.lengths[:, None] - 2 - 20) // 16
  needed = (column >= first) & (column < -(-p.tables.lengths[:, None] // 16))
  poisoned = jnp.where(needed, p.tables.block_tables, p.pages.kv.shape[0] - 2)
  tables = dataclasses.replace(p.tables, block_tables=poisoned)
  for got, want in zip(p.attend(implementation, tables=tables), p.attend(implementation)):
    np.testing.assert_array_equal(got, want)


@every_implementation
def test_unmapped_pages_are_masked(implementation):
  """Of three pages of two tokens the middle one is missing: as if its tokens were not there."""
  p = cases.build(cases.Case("", (6,), (1,), page_size=2, spare_rows=0))
  holey = p.tables.block_tables.at[0, 1].set(p.pages.kv.shape[0])
  out, lse = p.attend(implementation, tables=dataclasses.replace(p.tables, block_tables=holey))
  keep = np.array([0, 1, 4, 5])
  kept = dataclasses.replace(
    p, k=p.k[:, keep], v=p.v[:, keep], plan=dataclasses.replace(p.plan, positions=jnp.array([3]))
  )
  want_out, want_lse = cases.dense(cases.Case("", (), ()), kept)
  close(out, want_out, 1e-5)
  close(lse, want_lse, 1e-5)


@pytest.mark.parametrize(
  "name, change",
  [
    ("q", dict(q=jnp.zeros((3, 4, 9)))),
    ("q", dict(q=jnp.zeros((3, 5, 8)))),
    ("q", dict(q=jnp.zeros((2, 4, 8)))),
    ("q", dict(q=jnp.zeros((3, 32)))),
    ("q", dict(q=jnp.zeros((3, 4, 8), jnp.int32))),
    ("layer", dict(layer=2)),
    ("sinks", dict(options={"sinks": jnp.zeros(3)})),
    ("window", dict(options={"window": 0})),
    ("window", dict(options={"window": jnp.ones(2, jnp.int32)})),
    ("softcap", dict(options={"softcap": -1.0})),
    ("scale", dict(options={"scale": jnp.ones(4)})),
  ],
)
def test_misuse_names_the_argument(name, change):
  p = cases.build(cases.CASES[0])
  with pytest.raises(ValueError, match=f"^{name} "):
    p.attend("xla", **change)


def test_no_implementation_is_chosen_in_place_of_the_one_named():
  pages = cases.build(cases.Case("", (1,), (1,), page_size=16, head_dim=64)).pages
  assert attention.choose(None, pages, 16) == "xla"
  assert [attention.choose(name, pages, 16) for name in PORTABLE] == [*PORTABLE]
  assert attention.choose("tpu", pages, 16) == "tpu"
  with pytest.raises(ValueError, match="'cuda'"):
    attention.choose("cuda", pages, 16)


def test_the_platform_s_kernel_is_chosen_where_it_can_serve(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  fields = dict(page_size=16, dtype="bfloat16")
  served, refused = (
    cases.build(cases.Case("", (1,), (1,), head_dim=d, **fields)).pages for d in (64, 32)
  )
  assert attention.choose(None, served, 16) == "tpu"
  assert attention.choose(None, refused, 16) == "xla"
