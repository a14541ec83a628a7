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
def logprobs(window, text):
  tokens = np.zeros(tiny.LONGEST, np.int32)
  tokens[: len(text)] = text
  return np.asarray(jax.nn.log_softmax(_dense(Pair(tiny.MODEL, window), tokens)[len(text) - 1]))


def greedy(window, prompt, max_new_tokens):
  text = tuple(prompt)
  for _ in range(max_new_tokens):
    text = (*text, int(np.argmax(logprobs(window, text))))
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


@pytest.mark.parametrize("num_samples, others", [
  (3, [(0, (0,), 2)]),
  (1, [(0, (0,), 2), (0, (0, 0, 0, 0), 1), (2, (0,), 3)]),
])  # fmt: skip
def test_a_prompt_is_stored_on_the_pages_that_calls_in_flight_left_it(num_samples, others):
  asked = [(1 if num_samples > 1 else 3, (*range(8), 0, 0), 1, num_samples)]
  requests = [
    dict(arrival=at, prompt=prompt, max_new_tokens=most, num_samples=n[0] if n else 1, priority=0)
    for at, prompt, most, *n in asked + others
  ]
  options = dict(prefix_cache=True, num_host_pages=0, max_prefixes=2)
  tell("one token", (dict(options=options), requests, []))


def test_no_page_behind_a_window_stays():
  e = engine("window", options=dict(prefix_cache=False))
  done = e.submit(PROMPTS[4], Sampling(max_new_tokens=24))
  while e.step():
    pass
  windows, full = e.manager.stats()
  assert done.done and full.peak_pages == 10  # 40 tokens
  assert windows.peak_pages == 4  # 5 tokens before a piece of 8


def test_a_text_that_goes_on_is_found_by_its_end():
  e, sampling = engine("window"), Sampling(max_new_tokens=8)
  prompt = tuple(range(20))
  first = e.generate([prompt], sampling)[0][0]
  longer = e.submit((*prompt, *first.tokens, 7), Sampling(max_new_tokens=2))
  other = e.submit((*prompt, 30, 29), Sampling(max_new_tokens=2))
  while e.step():
    pass
  assert longer.num_cached == 27  # the last token drawn is in no cache
  assert other.num_cached == 16  # whole pages of the prompt were kept when it had been computed
  assert other.tokens == [greedy(6, (*prompt, 30, 29), 2)]
  finish(e)


def test_short_texts_need_no_more_windows_than_their_pages():
  e = engine("window")
  caches = tuple(dataclasses.replace(cache, num_pages=3) for cache in e.config.caches)
  e = Engine(Pair(tiny.MODEL, 6), dataclasses.replace(e.config, cache=caches), tokenizer=Words())
  got = e.generate([PROMPTS[0], PROMPTS[5]], Sampling(max_new_tokens=6))
  assert [c[0].tokens for c in got] == [greedy(6, p, 6) for p in (PROMPTS[0], PROMPTS[5])]
  finish(e)


def test_a_long_prompt_needs_no_more_windows_than_its_row_and_two_pieces():
  e = engine("window")
  caches = (dataclasses.replace(e.config.caches[0], num_pages=3 + 2 + 2), e.config.caches[1])
  e = Engine(Pair(tiny.MODEL, 6), dataclasses.replace(e.config, cache=caches), tokenizer=Words())
  got = e.generate([tuple(range(30)), PROMPTS[4]], Sampling(max_new_tokens=8))
  assert [c[0].tokens for c in got] == [greedy(6, p, 8) for p in (tuple(range(30)), PROMPTS[4])]
  finish(e)


def test_a_request_that_a_pool_of_windows_could_never_hold_is_refused():
  e = engine("window")
  caches = (dataclasses.replace(e.config.caches[0], num_pages=3), e.config.caches[1])
  e = Engine(Pair(tiny.MODEL, 6), dataclasses.replace(e.config, cache=caches))
  with pytest.raises(ValueError, match="the request needs 5 pages in group 0, but there are 3"):
    e.submit(PROMPTS[4], Sampling(max_new_tokens=4))


@pytest.mark.parametrize("kept", [11, 3])
def test_a_rollback_behind_a_window_computes_the_text_again(kept):
  e = engine("window", options=dict(prefix_cache=False))
  handle = e.submit(PROMPTS[2], Sampling(max_new_tokens=12))
  while e.step():
    pass
  handle.rollback(kept, Sampling(max_new_tokens=12))
  while e.step():
    pass
  assert handle.tokens == [greedy(6, PROMPTS[2], 12)]
  finish(e)


@pytest.mark.parametrize("room", [None, (14, 16)])
def test_beams_on_two_groups_find_the_same_texts(room):
  e = engine("window", room=room, max_beams=2)
  beside = e.submit(PROMPTS[0], Sampling(max_new_tokens=9))
  handles = [e.submit(p, Sampling(max_new_tokens=9, num_beams=2)) for p in (PROMPTS[2], PROMPTS[3])]
  finish(e)
  for prompt, handle in zip((PROMPTS[2], PROMPTS[3]), handles):
    wanted = tiny.search(prompt, 2, 9, logprobs=functools.partial(logprobs, 6))
    assert handle.tokens == [text for text, _ in wanted]
  assert beside.tokens == [greedy(6, PROMPTS[0], 9)]


def test_branches_on_two_groups_share_pages_and_go_on_alone():
  e = engine("window")
  handle = e.submit(PROMPTS[2], Sampling(max_new_tokens=16))
  while len(handle.tokens[0]) < 6:
    e.step()
  forced = [Sampling(max_new_tokens=16, logit_bias={token: 1e4}) for token in (7, 8)]
  branches = handle.fork(2, forced)
  while e.step():
    pass
  texts = [branch.tokens[0] for branch in branches]
  assert [text[-4:] for text in texts] == [[7] * 4, [8] * 4]
  assert texts[0][:6] == texts[1][:6] == greedy(6, PROMPTS[2], 6)
  branches[1].commit()
  handle.rollback(14, Sampling(max_new_tokens=20))
  finish(e)
  kept = texts[1][:14]
  assert handle.tokens[0] == [*kept, *greedy(6, (*PROMPTS[2], *kept), 6)]


def test_running_out_of_pages_names_the_group():
  m = engine("window").manager
  with pytest.raises(host.errors.OutOfPages, match=r"32 pages are needed.*28.*in group 0") as error:
    m.allocate_many([host.Request(n, 29) for n in range(4)])
  assert error.value.group == 0 and m.free_pages == (28, 40)
