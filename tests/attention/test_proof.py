"""The proof on the device: it finds each of these faults, and names the cases that show it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
from paged_jax import attention
from paged_jax.attention import cases, proof, tpu, tpu_write, xla
from paged_jax.attention.backend import scatter

CONFIG = paged_jax.CacheConfig(num_kv_heads=2, head_dim=8, page_size=4, dtype="float32")
FEW = tuple(case for case in cases.ESSENTIAL if case.name in
            ("decode", "window and start", "sinks, padding, refused"))  # fmt: skip
ALL = [*(case.name for case in FEW), "decode, heads 2 over 2"]


@pytest.fixture
def verify(monkeypatch):
  """Runs the proof of a changed "xla" on few cases."""

  def run(config=CONFIG, **changes):
    monkeypatch.setattr(xla, "BACKEND", xla.BACKEND._replace(**changes))
    monkeypatch.setattr(cases, "ESSENTIAL", FEW)
    return attention.verify("xla", config, num_heads=16, memory_bytes=2**20)

  return run


def shifted(part, *, starts=0, last=0):
  """A part that says other places than it should."""
  move = lambda x: jnp.where(x >= 0, x + last, x)  # noqa: E731
  blocks = part.blocks
  blocks = blocks._replace(
    starts=blocks.starts + starts, last=move(blocks.last), highs=move(blocks.highs)
  )
  return dataclasses.replace(part, starts=part.starts + starts, last=move(part.last), blocks=blocks)


def sees_too_little(q, pages, layer, tables, part, options):
  return xla.attend(q, pages, layer, tables, shifted(part, last=-1), options)


def sees_too_much(q, pages, layer, tables, part, options):
  return xla.attend(q, pages, layer, tables, shifted(part, last=1), options)


def swaps_heads(q, pages, layer, tables, part, options):
  out, lse = xla.attend(q, pages, layer, tables, part, options)
  return out[:, ::-1], lse


def mistakes_the_group(q, pages, layer, tables, part, options):
  """Query head i with KV head i % H."""
  b, heads, d = q.shape
  q = q.reshape(b, -1, 2, d).swapaxes(1, 2).reshape(q.shape)
  found = xla.attend(q, pages, layer, tables, part, options)
  out, lse = (x.reshape(b, 2, heads // 2, -1).swapaxes(1, 2).reshape(x.shape) for x in found)
  return out, lse


def ignores_the_window(q, pages, layer, tables, part, options):
  options = dataclasses.replace(options, window=jnp.int32(2**31 - 1))
  return xla.attend(q, pages, layer, tables, part, options)


def ignores_sinks(q, pages, layer, tables, part, options):
  return xla.attend(q, pages, layer, tables, part, dataclasses.replace(options, sinks=None))


def reads_the_other_layer(q, pages, layer, tables, part, options):
  return xla.attend(q, pages, layer - 1, tables, part, options)


def multiplies_stale_values(q, pages, layer, tables, part, options):
  """0 * NaN."""
  out, lse = xla.attend(q, pages, layer, tables, part, options)
  return out + 0 * jnp.sum(pages.kv).astype(out.dtype), lse


def forgets_the_logarithm(q, pages, layer, tables, part, options):
  out, lse = xla.attend(q, pages, layer, tables, part, options)
  return out, lse / jnp.log(jnp.float32(2))


def sees_what_is_refused(q, pages, layer, tables, part, options):
  out, lse = xla.attend(q, pages, layer, tables, part, options)
  return out, jnp.maximum(lse, -9.0)


def does_not_compile(q, pages, layer, tables, part, options):
  raise RuntimeError("Mosaic failed to compile\nwith many details")


def writes_the_other_layer(pages, layer, k, v, plan):
  return scatter(pages, layer - 1, k, v, plan)


def writes_beside(pages, layer, k, v, plan):
  return scatter(pages, layer, k, v, dataclasses.replace(plan, slots=plan.slots ^ 1))


def writes_what_is_refused(pages, layer, k, v, plan):
  size = pages.kv.shape[0] * pages.kv.shape[3]
  return scatter(pages, layer, k, v, dataclasses.replace(plan, slots=plan.slots % size))


def writes_nothing(pages, layer, k, v, plan):
  return pages


def copies_the_pages(pages, layer, k, v, plan):
  turned = dataclasses.replace(pages, kv=jax.lax.optimization_barrier(pages.kv[::-1]))
  n, t = pages.kv.shape[0], pages.kv.shape[3]
  slots = jnp.where(plan.slots < n * t, (n - 1 - plan.slots // t) * t + plan.slots % t, plan.slots)
  turned = scatter(turned, layer, k, v, dataclasses.replace(plan, slots=slots))
  return dataclasses.replace(pages, kv=turned.kv[::-1])


def with_scales(change):
  """`xla` on pages whose scales are changed."""

  def attend(q, pages, layer, tables, part, options):
    pages = dataclasses.replace(pages, scales=change(pages.scales))
    return xla.attend(q, pages, layer, tables, part, options)

  return attend


def writes_no_scales(pages, layer, k, v, plan):
  return dataclasses.replace(scatter(pages, layer, k, v, plan), scales=pages.scales)


def writes_other_scales(pages, layer, k, v, plan):
  made = scatter(pages, layer, k, v, plan)
  return dataclasses.replace(made, scales=made.scales[:, :, ::-1])


FAULTS_OF_8_BITS = {
  "attention without scales": (dict(attend=with_scales(jnp.ones_like)), "differs by"),
  "scales of values for keys": (dict(attend=with_scales(lambda x: x[:, :, ::-1])), "differs by"),
  "no scales written": (dict(write=writes_no_scales), "values of the pages are wrong"),
  "scales of other heads written": (dict(write=writes_other_scales), "values of the pages are"),
}


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", FAULTS_OF_8_BITS)
def test_a_fault_of_8_bit_pages_is_found_and_named(verify, name, dtype):
  changes, words = FAULTS_OF_8_BITS[name]
  report = verify(dataclasses.replace(CONFIG, dtype=dtype), **changes)
  found = [check.faults(report.tolerances) for check in report.checks]
  assert all(any(words in fault for fault in faults) for faults in found), str(report)


FAULTS = [  # what is wrong, the words that name it, and the cases that show it
  (dict(attend=sees_too_little), "differs by", ALL),
  (dict(attend=sees_too_much), "NaN: memory that holds no token was read", ALL),
  (dict(attend=swaps_heads), "output differs by", ALL),
  (dict(attend=mistakes_the_group), "differs by", ALL[:3]),
  (dict(attend=ignores_the_window), "differs by", [ALL[1]]),
  (dict(attend=ignores_sinks), "differs by", [ALL[2]]),
  (dict(attend=reads_the_other_layer), "NaN", ALL),
  (dict(attend=multiplies_stale_values), "output is NaN", ALL),
  (dict(attend=forgets_the_logarithm), "LSE differs by", ALL),
  (dict(attend=sees_what_is_refused), "LSE differs by inf", [ALL[2]]),
  (dict(attend=does_not_compile), "failed: RuntimeError: Mosaic failed to compile", ALL),
  (dict(write=writes_the_other_layer), "values of the pages are wrong", ALL),
  (dict(write=writes_beside), "values of the pages are wrong", ALL),
  (dict(write=writes_what_is_refused), "values of the pages are wrong", [ALL[2]]),
  (dict(write=writes_nothing), "values of the pages are wrong", ALL),
]


@pytest.mark.parametrize(("changes", "words", "names"), FAULTS,
                         ids=[next(iter(fault[0].values())).__name__ for fault in FAULTS])  # fmt: skip
def test_a_fault_is_found_and_named(verify, changes, words, names):
  report = verify(**changes)
  assert not report.ok
  found = {check.name: check.faults(report.tolerances) for check in report.checks}
  assert [name for name, faults in found.items() if faults] == names
  for name in names:
    assert any(words in fault for fault in found[name])
    [line] = [line for line in str(report).splitlines() if line.startswith(f"{name}  ")]
    assert words in line
  assert f"{len(names)} of 4 cases disagree" in str(report)


def test_a_copy_of_the_pages_is_found_by_the_memory_that_it_takes(verify):
  report = verify(write=copies_the_pages)
  assert not report.ok
  assert report.timing.copies and "the decode step copies the pages" in str(report)
  assert not any(np.isnan(check.output) or check.wrong_values for check in report.checks)


@pytest.mark.parametrize(
  ("implementation", "dtype"),
  [("reference", "float32"), ("xla", "bfloat16"), ("xla", "float16"), ("xla", "int8"),
   ("reference", "float8_e4m3fn")],
)  # fmt: skip
def test_a_sound_backend_agrees(implementation, dtype, monkeypatch):
  if dtype not in ("float32", "bfloat16"):  # of these all cases
    monkeypatch.setattr(cases, "ESSENTIAL", FEW)
  config = dataclasses.replace(CONFIG, page_size=16, dtype=dtype)
  report = attention.verify(implementation, config, memory_bytes=2**20)
  assert not [check for check in report.checks if check.faults(report.tolerances)]
  assert "cases disagree" not in str(report)


def test_a_sound_backend_agrees_where_values_are_channels_of_keys():
  config = dataclasses.replace(CONFIG, num_kv_heads=1, storage_head_dim=16, value_dim=5)
  report = attention.verify("xla", config, memory_bytes=2**20)
  assert report.ok, str(report)
  assert report.timing.num_bytes == 4 * 2048 * 16 * 4  # four rows, and nothing twice
  assert "pages of 4 x 8 (5 of them values), float32" in str(report)


def test_a_sound_backend_is_ok_in_place_and_its_table_says_where():
  told = []
  report = attention.verify(
    "xla", CONFIG, memory_bytes=2**20, progress=lambda *pair: told.append(pair)
  )
  assert report.ok, str(report)
  assert told == [(done, 13) for done in range(14)]
  assert report.timing.num_rows == 2 and report.timing.seconds > 0
  text = str(report)
  for words in (
    "device: cpu", f"jax {jax.__version__}", "paged_jax ", "attention: xla, 8 query heads over 2",
    "pages of 4 x 8, float32", "peak of the device not reported", "decode, heads 16 over 2",
  ):  # fmt: skip
    assert words in text
  assert text.isascii() and max(map(len, text.splitlines())) <= 110


@pytest.mark.once
@pytest.mark.parametrize("fields", [
  dict(head_dim=64), dict(head_dim=128, value_dim=5),
  dict(head_dim=64, dtype="int8", page_size=128),
], ids=str)  # fmt: skip
def test_the_tpu_kernel_agrees_in_the_interpreter(fields, monkeypatch):
  """Which has no place for pages: it copies them."""
  attend, write = (functools.partial(f, interpret=True) for f in (tpu.attend, tpu_write.write))
  monkeypatch.setattr(tpu, "BACKEND", tpu.BACKEND._replace(attend=attend, write=write))
  monkeypatch.setattr(cases, "ESSENTIAL", FEW)
  monkeypatch.setattr(proof, "NUM_TOKENS", 16)
  config = paged_jax.CacheConfig(**dict(num_kv_heads=2, page_size=16, dtype="float32") | fields)
  report = attention.verify("tpu", config, memory_bytes=0)
  copied = {"the pages were copied"}
  assert not [x for x in report.checks if {*x.faults(report.tolerances)} - copied], str(report)
  assert isinstance(report.timing, proof.Timing)


def test_cases_keep_their_shape_on_other_pages():
  [case] = [case for case in cases.ESSENTIAL if case.name == "window and start"]
  config = dataclasses.replace(CONFIG, page_size=16)
  fitted = cases.fitted(case, config, 8)
  assert fitted.lengths == (48, 160, 31)  # 3 pages, 10 pages, and 2 without one token
  assert fitted.starts == (15, 96, 0) and fitted.window == 33
  assert fitted.queries == case.queries


@pytest.mark.parametrize(
  ("changes", "copies"),
  [({}, False), (dict(peak_growth=40), False), (dict(peak_growth=60), True),
   (dict(temporary_bytes=60), True), (dict(in_place=False), True)],
)  # fmt: skip
def test_memory_of_half_the_pages_is_a_copy(changes, copies):
  sound = proof.Timing(
    num_rows=1, num_tokens=2048, num_bytes=100, seconds=1e-9, copied_bytes_per_second=4e11,
    temporary_bytes=40, peak_growth=None, in_place=True,
  )  # fmt: skip
  timing = sound._replace(**changes)
  assert timing.copies == copies
  assert "the step reaches 25% of it" in str(timing)
  report = proof.Report("xla", CONFIG, 8, (proof.Check("decode", 0, 0, 0, True),), timing)
  assert report.ok == (not copies)


@pytest.mark.parametrize("page_size", [1, 16, 100, 512])
def test_queries_of_fitted_cases_are_live(page_size):
  config = dataclasses.replace(CONFIG, page_size=page_size)
  for case in cases.essential(config, 8):
    starts = case.starts or (0,) * len(case.lengths)
    assert all(s + n <= x for s, n, x in zip(starts, case.queries, case.lengths))


def test_misuse_names_the_argument():
  with pytest.raises(ValueError, match="num_heads must be a multiple of 2, got 3"):
    attention.verify("xla", CONFIG, num_heads=3)
  with pytest.raises(NotImplementedError, match="'tpu' cannot serve this cache: head_dim"):
    attention.verify("tpu", dataclasses.replace(CONFIG, page_size=16))
