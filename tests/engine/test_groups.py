"""A model whose layers differ: texts are those of whole texts without a cache, whatever runs beside."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import PROMPTS, Words, force_preemption

import paged_jax
from paged_jax import host
from paged_jax.engine import Engine, EngineConfig, PromptLookup, Sampling
from paged_jax.testing import invariants, replay


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
  """As `tiny.Tiny`, but its first layer sees a window, and keeps its tokens in a cache of its own."""

  weights: tiny.Tiny
  window: int = dataclasses.field(metadata={"static": True})

  def __call__(self, tokens, caches, plans):
    model = self.weights
    x = model.embedding[tokens] + model.positions.at[plans[0].positions].get(mode="clip")
    after = []
    for layer, (cache, plan) in enumerate(zip(caches, plans)):
      q, k, v = model.qkv(layer, x)
      cache = paged_jax.write(cache, 0, k, v, plan)
      heads = paged_jax.attend(cache, 0, q, plan)  # the cache knows its window
      x = x + heads.reshape(len(x), -1) @ model.out[layer]
      after.append(cache)
    return x, tuple(after)

  def logits(self, hidden):
    return self.weights.logits(hidden)

  def dense(self, tokens):
    """Logits of a whole text [X], without a cache."""
    model = self.weights
    x = model.embedding[tokens] + model.positions[: len(tokens)]
    age = np.arange(len(tokens))[:, None] - np.arange(len(tokens))
    for layer, window in enumerate((self.window, len(tokens))):
      q, k, v = model.qkv(layer, x)
      seen = jnp.asarray((age >= 0) & (age < window))
      heads = jax.nn.dot_product_attention(q[None], k[None], v[None], mask=seen[None, None])[0]
      x = x + heads.reshape(len(x), -1) @ model.out[layer]
    return model.logits(x)


_dense = jax.jit(Pair.dense)


@functools.cache
def following(window, text):
  tokens = np.zeros(tiny.LONGEST, np.int32)
  tokens[: len(text)] = text
  return int(np.argmax(_dense(Pair(tiny.MODEL, window), tokens)[len(text) - 1]))


def greedy(window, prompt, max_new_tokens):
  text = tuple(prompt)
  for _ in range(max_new_tokens):
    text = (*text, following(window, text))
  return list(text[len(prompt) :])


# name: window, page size and pages of each group
CASES = {
  "window": (6, (4, 4), (28, 40)),
  "one token": (1, (1, 1), (40, 120)),
  "longer than any text": (100, (64, 2), (9, 60)),
  "unequal pages": (9, (2, 8), (48, 20)),
}


def engine(case, *, room=None, options=None, **fields):
  """An engine; `room` leaves so many pages of each group, others hold the rest."""
  window, sizes, pages = CASES[case]
  caches = tuple(
    dataclasses.replace(
      tiny.cache(num_rows=4, num_pages=n, page_size=size), num_layers=1, window=seen
    )
    for n, size, seen in zip(pages, sizes, (window, None))
  )
  config = EngineConfig(
    caches,
    tiny.options(**(options or {})),
    **(dict(num_steps=4, prompt_sizes=(8,), preemption="swap") | fields),
  )
  e = Engine(Pair(tiny.MODEL, window), config, tokenizer=Words())
  for group, left in enumerate(room or ()):
    kept = e.manager._pools.kept[group]
    taken = e.manager._state.restore(group, _images(e, group, kept.book.num_free - left))
    kept.at(taken)
  return e


def _images(e, group, count):
  shape = e.manager.cache[group].pages.kv.shape[1:]
  pages = e.manager.cache[group].pages
  blank = dataclasses.replace(pages, kv=jnp.zeros(shape, pages.kv.dtype))
  return [blank] * count


def finish(e):
  while e.step():
    pass
  invariants.check(e.manager.cache)
  report = e.audit()
  assert report.manager.device == type(report.manager.device)(*[0] * len(report.manager.device))
  assert report.manager.twin == 0 and not any(report[1:]), report


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_that_of_whole_texts(case):
  e = engine(case)
  got = e.generate(PROMPTS, Sampling(max_new_tokens=24))
  assert [c[0].tokens for c in got] == [greedy(CASES[case][0], p, 24) for p in PROMPTS]
  finish(e)
  e.manager.clear_prefixes()
  assert e.audit().clean
  assert e.manager.free_pages == tuple(x.num_pages for x in e.config.caches)


@st.composite
def stories(draw):
  """Settings of an engine, and requests with the round in which each arrives."""
  setting = dict(
    preemption=draw(st.sampled_from(["swap", "recompute"])),
    room=draw(st.sampled_from([None, (10, 14), (14, 12), (9, 40)])),
    options=dict(
      prefix_cache=draw(st.sampled_from([True, True, False])),
      num_host_pages=draw(st.sampled_from([0, 3, 64])),
      spill=draw(st.booleans()),
      max_prefixes=draw(st.sampled_from([2, 100])),
    ),
  )
  shared = tuple(range(14))
  requests = []
  for _ in range(draw(st.integers(1, 7))):
    prompt = shared[: draw(st.integers(0, 14))] + tuple(
      draw(st.lists(st.integers(0, tiny.VOCABULARY - 1), min_size=1, max_size=9))
    )
    requests.append(
      dict(
        arrival=draw(st.integers(0, 8)),
        prompt=prompt,
        max_new_tokens=draw(st.integers(1, min(16, 33 - len(prompt)))),
        num_samples=draw(st.sampled_from([1, 1, 1, 3])),
        priority=draw(st.integers(0, 2)),
      )
    )
  forced = draw(st.lists(st.booleans(), min_size=10, max_size=10))  # preempt the last one then
  return setting, requests, forced


def tell(case, story, **fields):
  setting, requests, forced = story
  e = engine(case, **(setting | fields))
  handles = {}
  for turn in range(2000):
    for n, request in enumerate(requests):
      if request["arrival"] == turn:
        wanted = Sampling(request["max_new_tokens"], num_samples=request["num_samples"])
        handles[n] = e.submit(request["prompt"], wanted, priority=request["priority"])
    if turn < len(forced) and forced[turn] and e._queue.running:
      force_preemption(e)
    e.manager._state.cache = replay.poison(e.manager.cache)  # what a page had is never seen
    if not e.step() and len(handles) == len(requests) and turn >= len(forced):
      break
  finish(e)
  for n, request in enumerate(requests):
    want = greedy(CASES[case][0], request["prompt"], request["max_new_tokens"])
    assert handles[n].tokens == [want] * request["num_samples"]


SETTINGS = dict(deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))  # fmt: skip


@pytest.mark.timeout(180)  # it compiles the programs of two kinds of engine
@settings(max_examples=20, **SETTINGS)
@given(stories(), st.sampled_from([None, PromptLookup(3)]))
def test_any_mix_of_requests_gives_each_its_own_text(story, drafter):
  tell("window", story, drafter=drafter)


@pytest.mark.parametrize("case", [case for case in CASES if case != "window"])
@settings(max_examples=5, **SETTINGS)
@given(st.data())
def test_any_mix_on_other_pages_gives_each_its_own_text(case, data):
  setting, requests, forced = data.draw(stories())
  tell(case, (setting | {"room": None}, requests, forced))


def test_no_page_behind_a_window_stays():
  e = engine("window")
  done = e.submit(PROMPTS[4], Sampling(max_new_tokens=24))
  most = 0
  while e.step():
    windows, full = e.manager.stats()
    most = max(most, windows.used_pages)
  assert done.done
  # 6 tokens and a piece of 8 are on 5 pages at most, the text on 11; two ends are kept, 3 pages each.
  assert most <= 5 + 6 and full.peak_pages >= 11


def test_a_prompt_that_comes_again_is_found_by_its_end():
  e = engine("window")
  prompt = tuple(range(20))
  first = e.generate([prompt], Sampling(max_new_tokens=8))[0][0]
  again = e.generate([(*prompt, *first.tokens, 7)], Sampling(max_new_tokens=2))[0][0]
  assert again.num_cached == 27  # but the last token, which the cache does not have
  third = e.generate([(*prompt, 30, 29)], Sampling(max_new_tokens=2))[0][0]
  assert third.num_cached == 20
  assert third.tokens == greedy(6, (*prompt, 30, 29), 2)
  finish(e)


def test_a_request_that_no_window_pool_could_hold_is_refused_by_group():
  with pytest.raises(ValueError, match="group 0"):
    e = engine("window")
    caches = (dataclasses.replace(e.config.caches[0], num_pages=3), e.config.caches[1])
    Engine(Pair(tiny.MODEL, 6), dataclasses.replace(e.config, cache=caches)).submit(PROMPTS[4])


def test_branches_roll_back_as_far_as_windows_reach():
  e = engine("window")
  handle = e.submit(PROMPTS[2], Sampling(max_new_tokens=12))
  while e.step():
    pass
  for kept in (11, 3):  # within the window, and behind it: then the text is computed again
    handle.rollback(kept, max_new_tokens=12)
    while e.step():
      pass
    assert handle.tokens[0] == greedy(6, PROMPTS[2], 12)
  finish(e)


def test_running_out_of_pages_names_the_group():
  with pytest.raises(host.errors.OutOfPages, match="29 pages are needed.*in group 0") as raised:
    engine("window").manager.allocate(host.Request("a", 48)), engine("window")
    m = engine("window").manager
    m.allocate_many([host.Request(n, 29) for n in range(4)])
  assert raised.value.group == 0
