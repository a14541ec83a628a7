"""How many pages does copy-on-write sharing save in parallel sampling and in beam search?

As in section 6.3 of the PagedAttention paper (Kwon et al. 2023): pages saved by sharing over pages
without it, averaged over time. Real caches and verbs (`fork`, `extend`, `reorder`); the beams are
those of the packaged model on random prompts. Lengths are log-normal with the paper's means:
Alpaca 19.31 and 58.45 tokens, ShareGPT 161.31 and 337.99 (figure 11), cut at 1,000.
"""

import functools

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import jax.numpy as jnp
import lengths
import numpy as np

import paged_jax
from paged_jax import models

SIZE, GROUPS = 16, 8  # tokens per page; requests at a time
MIXES = {"alpaca": (19.31, 58.45, 0.6), "sharegpt": (161.31, 337.99, 0.9)}
WIDTHS = (2, 4, 6)
PAPER = {
  ("sampling", "alpaca"): "6.1-9.8", ("sampling", "sharegpt"): "16.2-30.5",
  ("beam", "alpaca"): "37.6-55.2", ("beam", "sharegpt"): "44.3-66.3",
}  # fmt: skip


def mapped(cache) -> jax.Array:
  """Pages that the rows would use if none were shared."""
  return jnp.sum(cache.block_tables < cache.ledger.pool.num_pages, dtype=jnp.int32)


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(decoder, cache, tokens, rows, positions):
  """A prompt's tokens [B] into their rows; padding has row S."""
  counts = jnp.zeros(cache.ledger.num_rows, jnp.int32).at[rows].add(1, mode="drop")
  cache, _ = paged_jax.extend(cache, counts)
  return decoder(tokens, cache, paged_jax.plan(cache, rows, positions))[1]


@functools.partial(jax.jit, static_argnames=("width", "beams"))
def generate(decoder, cache, tokens, left, *, width: int, beams: bool):
  """All rows to their end: `left` i32[S] tokens each; returns pages used and saved, over time."""
  s, n = left.shape[0], cache.ledger.pool.num_pages
  own = jnp.arange(s, dtype=jnp.int32)

  def body(state):
    cache, tokens, scores, left, used, wanted = state
    active = left > 0
    cache, _ = paged_jax.extend(cache, active.astype(jnp.int32))
    used += n - cache.num_free
    wanted += mapped(cache)
    if beams:
      plan = paged_jax.plan(cache, jnp.where(active, own, s), cache.lengths - 1)
      logits, cache = decoder(tokens, cache, plan)
      logits = scores[:, None] + jax.nn.log_softmax(logits.astype(jnp.float32))
      vocabulary = logits.shape[-1]
      best, at = jax.lax.top_k(logits.reshape(-1, width * vocabulary), width)
      parents = own.reshape(-1, width)[:, :1] + at // vocabulary
      sources = jnp.where(active, parents.reshape(-1), own)
      scores, tokens = best.reshape(-1), (at % vocabulary).reshape(-1)
      cache, _ = paged_jax.reorder(cache, sources)
    left -= active
    cache, _ = paged_jax.free(cache, active & (left == 0))
    return cache, tokens, scores, left, used, wanted

  scores = jnp.where(own % width == 0, 0.0, -jnp.inf)  # beams of a request begin as one
  zero = jnp.float32(0)
  state = cache, tokens, scores, left, zero, zero
  *_, used, wanted = jax.lax.while_loop(lambda state: jnp.any(state[3] > 0), body, state)
  return used, wanted


def saved(decoder, sizes: np.ndarray, width: int, *, beams: bool) -> float:
  """Share of pages saved for requests of these prompt and output tokens."""
  used = wanted = 0.0
  rng = np.random.default_rng(0)
  rows = GROUPS * width
  per_row = -(-2000 // SIZE)
  config = models.cache_config(
    decoder.config, num_pages=rows * per_row, num_rows=rows, max_length=2000, page_size=SIZE
  )
  for group in sizes.reshape(-1, GROUPS, 2):
    cache = paged_jax.init(config)
    heads = np.arange(GROUPS) * width
    for row, prompt in zip(heads, group[:, 0]):
      tokens = rng.integers(0, decoder.config.vocab_size, 1024).astype(np.int32)
      inside = np.arange(1024) < prompt
      where = np.where(inside, row, rows).astype(np.int32)
      if beams:
        cache = prefill(decoder, cache, tokens, where, np.arange(1024, dtype=np.int32))
      else:
        counts = np.zeros(rows, np.int32)
        counts[row] = prompt
        cache, _ = paged_jax.jitted.extend(cache, counts)
    targets = np.setdiff1d(np.arange(rows), heads).astype(np.int32)
    cache, info = paged_jax.jitted.fork(cache, (targets // width * width).astype(np.int32), targets)
    assert np.asarray(info.ok).all()
    left = np.repeat(group[:, 1], width).astype(np.int32)
    first = jnp.zeros(rows, jnp.int32)
    more = generate(decoder, cache, first, left, width=width, beams=beams)
    used, wanted = used + float(more[0]), wanted + float(more[1])
  return 1 - used / wanted


def main():
  args = measure.arguments(__doc__.splitlines()[0], requests=(int, 24, "requests of each mix"))
  decoder = models.load(models.embedded())
  rows, summary = [], {}
  for way in ("sampling", "beam"):
    for mix, (prompt, output, spread) in MIXES.items():
      sizes = lengths.like(prompt, output, spread, args.requests // GROUPS * GROUPS, 1000)
      row = {"": way, "mix": mix}
      for width in WIDTHS:
        share = saved(decoder, sizes, width, beams=way == "beam")
        row[f"{width}, %"] = summary[f"{way}_{mix}_{width}"] = 100 * share
      rows.append(row | {"paper, %": PAPER[way, mix]})
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
