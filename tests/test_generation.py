import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paged_jax import generation, jitted, models, testing
from paged_jax.engine import sampling
from paged_jax.engine.sampling import Sampling
from paged_jax.generation import Request, Rows
from paged_jax.models import Decoder, DecoderConfig, Rope
from paged_jax.testing import invariants

PAGE_SIZE, NUM_ROWS, NUM_PAGES, MAX_LENGTH = 4, 4, 40, 48


@pytest.fixture(autouse=True)
def prefill_in_pieces(monkeypatch):
  monkeypatch.setattr(generation, "_PREFILL_SIZES", (8, 16))


@functools.cache
def tiny_decoder():
  config = DecoderConfig(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, max_length=MAX_LENGTH, windows=(None, None), ropes=(Rope(), Rope()),
  )  # fmt: skip
  return Decoder(config, rngs=nnx.Rngs(3))


def empty_cache(num_pages=NUM_PAGES):
  config = models.cache_config(
    tiny_decoder().config, num_pages=num_pages, num_rows=NUM_ROWS, page_size=PAGE_SIZE,
    dtype=jnp.float32,
  )  # fmt: skip
  return jitted.init(config)


def run(*requests, num_pages=NUM_PAGES, **options):
  """The last update of a run, after which nothing is left in the cache."""
  update = generation.generate(tiny_decoder(), empty_cache(num_pages), requests, **options)
  assert all(update.done) and not update.rows
  assert int(update.cache.num_free) == num_pages
  assert not np.any(update.cache.lengths)
  invariants.check(update.cache)
  return update


def prompt(length, seed=0):
  return tuple(np.random.default_rng(seed).integers(61, size=length).tolist())


@jax.jit
def next_token(decoder, tokens, length):
  return jnp.argmax(decoder.dense(tokens[None])[0, length - 1])


def recompute(request):
  """Greedy tokens without a cache, one request and one token at a time."""
  tokens = list(request.prompt)
  for _ in range(request.max_new_tokens):
    padded = np.zeros(MAX_LENGTH, np.int32)
    padded[: len(tokens)] = tokens
    tokens.append(int(next_token(tiny_decoder(), padded, len(tokens))))
  return tokens[len(request.prompt) :]


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def primitives(jaxpr):
  """Names of all primitives in a jaxpr and those inside it."""

  def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")

  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    for inner in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr):
      if is_jaxpr(inner):
        yield from primitives(getattr(inner, "jaxpr", inner))


def rows(**fields):
  own = {name: fields.pop(name, 0) for name in ("tokens", "remaining")}
  own = {name: np.broadcast_to(x, NUM_ROWS).astype(np.int32) for name, x in own.items()}
  each = zip(*(np.broadcast_to(x, NUM_ROWS).tolist() for x in fields.values()))
  drawn = [Sampling(**dict(zip(fields, values))) for values in each] or [Sampling()] * NUM_ROWS
  return Rows(**own, draws=sampling.draws([(x, 0) for x in drawn], 61))


def draw(logits, num_draws=512, **fields):
  """Tokens drawn from the same logits at many positions, [num_draws, S]."""
  logits = jnp.broadcast_to(jnp.array(logits, jnp.float32)[None], (NUM_ROWS, len(logits)))
  positions = jnp.arange(num_draws, dtype=jnp.int32)[:, None] + jnp.zeros((1, NUM_ROWS), jnp.int32)
  return np.asarray(
    jax.lax.map(lambda p: sampling.draw(logits, rows(**fields).draws, p), positions)
  )


# Whole runs.


def test_greedy_tokens_equal_recomputation_around_page_boundaries():
  requests = [Request(prompt(n, seed=n), max_new_tokens=10) for n in (1, 3, 4, 5, 8, 9, 38)]
  update = run(*requests)
  assert update.tokens == [recompute(request) for request in requests]
  assert update.summary.num_tokens == 70


def test_samples_share_the_prompt_and_equal_single_runs_with_their_seeds():
  request = Request(prompt(11), max_new_tokens=9, num_samples=3, temperature=1.0, seed=7)
  update = run(request)
  alone = [dataclasses.replace(request, num_samples=1, seed=7 + i) for i in range(3)]
  assert update.tokens == run(*reversed(alone)).tokens[::-1]
  assert len({tuple(tokens) for tokens in update.tokens}) == 3
  # 10 of 19 tokens are the prompt's: pages 0 and 1 stay shared, two samples copy page 2.
  assert update.summary.pages == 2 + 3 * 3
  assert update.summary.unshared_pages == 3 * 5
  assert update.summary.copies == 2


def test_a_small_pool_serves_in_turns_with_the_same_texts():
  requests = [
    Request(prompt(n, seed=n), max_new_tokens=9, num_samples=k, temperature=t, top_k=20, top_p=0.9)
    for n, k, t in ((11, 3, 1.0), (2, 1, 0.0), (17, 1, 0.7), (30, 2, 1.5), (4, 2, 1.0))
  ]
  large, small = run(*requests), run(*requests, num_pages=13, num_steps=16)
  assert small.tokens == large.tokens
  assert small.summary.pages <= 13 < large.summary.pages


@pytest.mark.parametrize("length", [1, 4, 5, 6, 9])
@pytest.mark.parametrize("num_samples", [1, 4])
def test_a_request_comes_to_hold_exactly_the_pages_that_are_reserved(length, num_samples):
  request = Request(prompt(length), max_new_tokens=8, num_samples=num_samples)
  assert run(request).summary.pages == generation.pages_for(request, PAGE_SIZE)


def test_reserved_pages_of_a_fork_agree_with_pages_needed():
  request = Request(prompt(11), max_new_tokens=9, num_samples=3)
  cache, _ = jitted.extend(empty_cache(), np.array([10, 0, 0, 0], np.int32))
  none = NUM_ROWS
  src, dst = np.array([0, 0, none, none], np.int32), np.array([1, 2, none, none], np.int32)
  cache, _ = jitted.fork(cache, src, dst)
  needed = jitted.pages_needed(cache, np.array([9, 9, 9, 0], np.int32))
  used = NUM_PAGES - int(cache.num_free)
  assert used + int(needed.sum()) == generation.pages_for(request, PAGE_SIZE)


def test_an_end_token_is_the_last_one():
  request = Request(prompt(5), max_new_tokens=30)
  tokens = recompute(request)
  eos = tokens[7]
  update = run(request, eos=(60, eos))
  assert update.tokens[0] == tokens[: tokens.index(eos) + 1]


def test_a_stop_on_the_host_cuts_and_frees_that_sample_alone():
  def stops(tokens):
    return 11 if len(tokens) >= 11 else None

  requests = [Request(prompt(5), max_new_tokens=30), Request(prompt(6), max_new_tokens=30)]
  update = run(dataclasses.replace(requests[0], stop=stops), requests[1])
  assert update.tokens == [recompute(requests[0])[:11], recompute(requests[1])]


def test_updates_tell_the_tokens_as_they_come():
  request = Request(prompt(5), max_new_tokens=20)
  lengths, caches = [], []
  for update in generation.stream(tiny_decoder(), empty_cache(), [request]):
    lengths.append(len(update.tokens[0]))
    caches.append(int(update.cache.lengths[0]))
  assert lengths == [0, 0, 8, 16, 20]
  assert caches == [0, 4, 12, 20, 0]


def test_no_requests_give_an_empty_run():
  assert run().tokens == []


def test_rows_and_pages_of_others_are_left_alone():
  cache, _ = jitted.extend(empty_cache(), np.array([0, 9, 0, 0], np.int32))
  request = Request(prompt(5), max_new_tokens=8, num_samples=3)
  update = generation.generate(tiny_decoder(), cache, [request])
  assert update.cache.lengths.tolist() == [0, 9, 0, 0]
  assert int(update.cache.num_free) == NUM_PAGES - 3
  invariants.check(update.cache)


def test_steady_state_compiles_nothing():
  requests = [Request(prompt(n), max_new_tokens=9, num_samples=2) for n in (1, 7, 12)]
  run(*requests)
  sizes = generation.decode._cache_size(), generation.prefill._cache_size()
  run(*[dataclasses.replace(x, temperature=0.5, top_k=3, seed=9) for x in requests[::-1]])
  assert (generation.decode._cache_size(), generation.prefill._cache_size()) == sizes


# Requests that cannot run.


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"prompt": ()}, "prompt is empty"),
    ({"max_new_tokens": 0}, "max_new_tokens is out of range: 0"),
    ({"num_samples": 0}, "num_samples is out of range: 0"),
    ({"temperature": -1.0}, "temperature is out of range: -1.0"),
    ({"temperature": float("nan")}, "temperature is out of range: nan"),
    ({"top_k": 0}, "top_k is out of range: 0"),
    ({"top_p": 0.0}, "top_p is out of range: 0.0"),
    ({"top_p": 1.5}, "top_p is out of range: 1.5"),
    ({"seed": -1}, "seed is out of range: -1"),
  ],
)
def test_a_request_names_the_field_that_is_wrong(fields, message):
  with pytest.raises(ValueError, match=message):
    Request(**({"prompt": (1,)} | fields))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"prompt": prompt(40)}, "prompt 2 needs 49 tokens, but a row holds 48"),
    ({"prompt": prompt(39), "num_samples": 4}, "prompt 2 needs 21 pages, but 13 are free"),
    ({"num_samples": 5}, "prompt 2 needs 5 rows, but 4 are free"),
    ({"prompt": (3, 61)}, "prompt 2 has token 61, but the vocabulary has 61"),
    ({"prompt": (3, -1)}, "prompt 2 has token -1, but the vocabulary has 61"),
  ],
)
def test_a_request_that_can_never_run_is_refused_before_anything_runs(fields, message):
  fine = {"prompt": (1,), "max_new_tokens": 10}
  requests = [Request(**fine), Request(**(fine | fields))]
  with pytest.raises(ValueError, match=message):
    next(generation.stream(tiny_decoder(), empty_cache(13), requests))


# The programs.


def test_programs_call_no_host():
  cache, decoder = abstract(empty_cache()), abstract(tiny_decoder())
  eos, ids = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((32,), jnp.int32)
  decode = generation.decode.trace(decoder, cache, abstract(rows()), eos, num_steps=8)
  prefill = generation.prefill.trace(decoder, cache, ids, ids, ids)
  names = {*primitives(decode.jaxpr.jaxpr), *primitives(prefill.jaxpr.jaxpr)}
  assert {"while", "scan", "dot_general", "random_bits"} <= names
  assert not [name for name in names if "callback" in name or "feed" in name]


def test_decode_updates_the_cache_in_place():
  decode = functools.partial(generation.decode.__wrapped__, num_steps=8)
  args = (tiny_decoder(), empty_cache(), rows(), np.zeros(1, np.int32))
  testing.assert_in_place(decode, *args)


def test_a_row_without_a_page_waits_for_one():
  cache, _ = jitted.extend(empty_cache(13), np.array([39, 8, 0, 0], np.int32))  # 12 pages
  remaining = np.array([8, 4, 0, 0], np.int32)  # row 1 takes the last one, then row 0 needs one
  eos = np.zeros(0, np.int32)
  cache, drawn = generation.decode(
    tiny_decoder(), cache, rows(remaining=remaining), eos, num_steps=16
  )
  assert drawn.ok[:, 0].tolist() == [True] + [False] * 3 + [True] * 7 + [False] * 5
  assert drawn.ok.sum(axis=0).tolist() == [8, 4, 0, 0]
  assert int(cache.num_free) == 13
  invariants.check(cache)


# Sampling.


def test_cutoff_is_the_smallest_logit_kept():
  logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]] * 4, jnp.float32))
  draws = rows(top_k=np.array([4, 2, 4, 3]), top_p=np.array([1.0, 1.0, 0.6, 0.5])).draws
  kept = jnp.exp(sampling.cutoff(logits, draws))
  np.testing.assert_allclose(kept, [0.1, 0.25, 0.25, 0.5], rtol=1e-5)


def test_draws_follow_the_distribution_of_each_row():
  drawn = draw(
    np.log([0.1, 0.2, 0.3, 0.4]),
    temperature=np.array([0.0, 1.0, 0.5, 1.0]),
    top_k=np.array([4, 4, 4, 3]),
    seed=np.arange(4),
    num_draws=4096,
  )
  counts = np.stack([np.bincount(drawn[:, row], minlength=4) for row in range(4)]) / 4096
  squares = np.array([1, 4, 9, 16]) / 30
  expected = [[0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4], squares, [0, 2 / 9, 3 / 9, 4 / 9]]
  np.testing.assert_allclose(counts, expected, atol=0.03)
  assert not counts[3, 0]


def test_the_most_likely_token_is_the_limit_of_every_rule():
  logits = np.random.default_rng(0).normal(size=61)
  greedy = draw(logits)
  np.testing.assert_array_equal(greedy, np.argmax(logits))
  for rule in ({"top_k": 1}, {"top_p": 1e-6}):
    np.testing.assert_array_equal(draw(logits, temperature=5.0, **rule), greedy)


def test_a_draw_depends_on_seed_and_position_alone():
  logits = np.random.default_rng(0).normal(size=61)
  drawn = draw(logits, temperature=1.0, seed=np.array([5, 6, 5, 7]))
  again = draw(logits, temperature=np.array([0.3, 1.0, 0.0, 1.0]), seed=np.array([9, 5, 6, 6]))
  np.testing.assert_array_equal(drawn[:, 0], drawn[:, 2])
  np.testing.assert_array_equal(again[:, [1, 3]], drawn[:, [0, 1]])
  assert np.mean(drawn[:, 0] == drawn[:, 1]) < 0.5
