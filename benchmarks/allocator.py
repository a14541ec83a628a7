"""What does allocation inside a jitted program cost, and does it depend on the pool's size?

`flatness`: `extend` at 256 rows in a donated scan, slowest over fastest pool, 1,024 to 1,048,576
pages, empty and half full at random. `prefill_vs_serial`: a page-by-page allocator (argmin in a
fori_loop, as in-graph allocators are often written) over ours, for 256 rows x 64 pages of 32,768.
`ledger_share_of_decode`: share of a decode step of the packaged model, 64 rows, that goes into
`extend` and `plan`.
"""

import dataclasses
import functools

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np

import paged_jax
from paged_jax import ledger as ledger_lib
from paged_jax import models

ROWS, STEPS = 256, 16


def filled(config: paged_jax.CacheConfig, share: float) -> paged_jax.Ledger:
  """A ledger with that share of its pages held by the host, at random."""
  ledger = ledger_lib.init(config)
  n = config.num_pages
  busy = np.random.default_rng(0).permutation(n) < int(share * n)
  words = np.packbits(np.pad(~busy, (0, -n % 32)), bitorder="little").view(np.uint32)
  held = jnp.asarray(busy.astype(np.int32))
  pool = dataclasses.replace(
    ledger.pool,
    free=jnp.asarray(words),
    refcount=held,
    holds=held.copy(),
    num_free=jnp.int32(n - busy.sum()),
  )
  ledger = dataclasses.replace(ledger, pool=pool)
  # Rows of unequal length, so that each step some of them begin a page.
  ledger, info, _ = ledger_lib.extend(ledger, jnp.arange(ROWS, dtype=jnp.int32) % 16)
  assert bool(info.ok.all())
  return ledger


@functools.partial(jax.jit, donate_argnums=0)
def decode(ledger: paged_jax.Ledger):
  """Sixteen steps: every row begins one page."""
  one = jnp.ones(ROWS, jnp.int32)

  def step(ledger, _):
    ledger, info, _ = ledger_lib.extend(ledger, one)
    return ledger, info.ok.all()

  return jax.lax.scan(step, ledger, None, length=STEPS)


@functools.partial(jax.jit, donate_argnums=0)
def back(ledger: paged_jax.Ledger):
  """Undoes `decode`, outside the clock."""
  return ledger_lib.trim(ledger, ledger.tables.lengths - STEPS)[0]


class Loop:
  """A ledger that goes through `decode` and back, timed on the way out."""

  def __init__(self, num_pages: int, share: float):
    config = paged_jax.CacheConfig(num_pages=num_pages, num_rows=ROWS, max_length=1024)
    self.ledger = filled(config, share)
    self.once()

  def once(self) -> float:
    """Seconds per step, after a first go that brings this ledger back into the CPU's caches."""
    self._go()
    return self._go()

  def _go(self) -> float:
    held = {}

    def run():
      held["out"] = decode(self.ledger)
      return held["out"]

    took = measure.seconds(run)
    ledger, ok = held["out"]
    assert bool(ok.all())
    self.ledger = jax.block_until_ready(back(ledger))
    return took / STEPS


def serial(refcount: jax.Array, block_tables: jax.Array, counts: jax.Array):
  """One page per turn: the first with refcount 0."""
  width = block_tables.shape[1]

  def turn(i, carry):
    refcount, block_tables = carry
    row, column = i // width, i % width
    page = jnp.argmin(refcount)
    wanted = column < counts[row]
    refcount = refcount.at[page].add(wanted.astype(jnp.int32))
    page = jnp.where(wanted, page.astype(jnp.int32), block_tables[row, column])
    return refcount, block_tables.at[row, column].set(page)

  return jax.lax.fori_loop(0, block_tables.size, turn, (refcount, block_tables))


def prefill_vs_serial(rounds: int) -> float:
  config = paged_jax.CacheConfig(num_pages=32768, num_rows=ROWS, max_length=64 * 16)
  counts = jnp.full(ROWS, 64, jnp.int32)
  ours, theirs = jax.jit(ledger_lib.extend), jax.jit(serial)
  ledger = ledger_lib.init(config)
  took = measure.medians(
    {
      "ours": lambda: ours(ledger, counts * 16),
      "serial": lambda: theirs(ledger.pool.refcount, ledger.tables.block_tables, counts),
    },
    rounds,
  )
  return took["serial"] / took["ours"]


def ledger_share_of_decode(rounds: int) -> float:
  decoder = models.load(models.embedded())
  rows, prompt, steps = 64, 100, 32
  config = models.cache_config(
    decoder.config, num_pages=1024, num_rows=rows, page_size=16, max_length=256
  )
  every = jnp.arange(rows, dtype=jnp.int32)
  ones = jnp.ones(rows, jnp.int32)

  def bookkeeping(ledger, pages):
    cache, _ = paged_jax.extend(paged_jax.Cache(ledger, pages), ones)
    return cache, paged_jax.plan(cache, every, cache.lengths - 1)

  def forward(cache, tokens, plan):
    hidden, cache = decoder(tokens, cache, plan)
    return jnp.argmax(decoder.logits(hidden), axis=-1).astype(jnp.int32), cache

  @functools.partial(jax.jit, donate_argnums=0)
  def whole(cache, tokens):
    def step(carry, _):
      cache, tokens = carry
      cache, plan = bookkeeping(cache.ledger, cache.pages)
      tokens, cache = forward(cache, tokens, plan)
      return (cache, tokens), None

    (cache, tokens), _ = jax.lax.scan(step, (cache, tokens), None, length=steps)
    cache, _ = paged_jax.trim(cache, jnp.full(rows, prompt, jnp.int32))
    return cache

  @functools.partial(jax.jit, donate_argnums=0)
  def precomputed(cache, tokens, states):
    ledger = cache.ledger

    def step(carry, state):
      pages, tokens = carry
      tables, plan = state
      now = dataclasses.replace(ledger, tables=tables)
      tokens, cache = forward(paged_jax.Cache(now, pages), tokens, plan)
      return (cache.pages, tokens), None

    (pages, _), _ = jax.lax.scan(step, (cache.pages, tokens), states)
    return paged_jax.Cache(ledger, pages)

  @jax.jit
  def ahead(cache):
    def step(ledger, _):
      cache_, plan = bookkeeping(ledger, cache.pages)
      return cache_.ledger, (cache_.ledger.tables, plan)

    return jax.lax.scan(step, cache.ledger, None, length=steps)[1]

  def start():
    cache, _ = paged_jax.jitted.extend(paged_jax.init(config), jnp.full(rows, prompt, jnp.int32))
    return cache

  state = {"whole": start(), "precomputed": start()}
  states = ahead(state["whole"])
  tokens = jnp.zeros(rows, jnp.int32)

  def run_whole():
    state["whole"] = whole(state["whole"], tokens)
    return state["whole"]

  def run_precomputed():
    state["precomputed"] = precomputed(state["precomputed"], tokens, states)
    return state["precomputed"]

  took = measure.medians({"whole": run_whole, "precomputed": run_precomputed}, rounds)
  return 1 - took["precomputed"] / took["whole"]


def main():
  options = measure.arguments(__doc__)
  cases = [
    (n, share) for n in (1024, 65536, 1048576) for share in (0.0, 0.5, 0.99) if n * share <= n - 512
  ]
  loops = {case: Loop(*case) for case in cases}
  times = {case: [] for case in cases}
  for _ in range(options.rounds):
    for case, loop in loops.items():
      times[case].append(loop.once() * 1e6)
  took = {case: float(np.median(each)) for case, each in times.items()}
  rows = [{"pages": n, "full": share, "us_per_extend": us} for (n, share), us in took.items()]
  flat = [us for (_, share), us in took.items() if share < 0.9]
  summary = {
    "flatness": max(flat) / min(flat),
    "prefill_vs_serial": prefill_vs_serial(max(options.rounds // 3, 3)),
    "ledger_share_of_decode": ledger_share_of_decode(options.rounds),
  }
  measure.report(rows, summary, as_json=options.json)


if __name__ == "__main__":
  main()
