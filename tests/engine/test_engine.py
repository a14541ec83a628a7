"""The engine against one request at a time: whatever runs beside it, a request's text is its own."""

import asyncio
import functools
import types

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import PROMPTS, SIZE, Words, engine, finish, force_preemption

from paged_jax.engine import PromptLookup, Sampling
from paged_jax.engine import calls as calls_lib
from paged_jax.engine.device import program
from paged_jax.host import Request, errors


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("num_pages", [8, 11, 24])
def test_greedy_text_is_that_of_one_request_at_a_time(num_steps, prefix_cache, num_pages):
  e = engine(num_steps=num_steps, num_pages=num_pages, options=dict(prefix_cache=prefix_cache))
  got = e.generate(PROMPTS, Sampling(max_new_tokens=12))
  assert [c[0].tokens for c in got] == [tiny.greedy(p, 12) for p in PROMPTS]
  assert {c[0].reason for c in got} == {"length"}
  finish(e)


def test_padded_storage_gives_the_same_text():
  """The head dim of 8 kept as 11, swapped and shared like any other."""
  e = engine(cache=dict(storage_head_dim=11), num_pages=8, num_steps=1)
  got = e.generate(PROMPTS, Sampling(max_new_tokens=12))
  assert [c[0].tokens for c in got] == [tiny.greedy(p, 12) for p in PROMPTS]
  finish(e)


@pytest.mark.once
@pytest.mark.timeout(180)  # it compiles the programs of an engine
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_text_of_8_bit_pages_does_not_depend_on_what_runs_beside_it(preemption):
  """Prefixes, copies on write, swaps and recomputation move scales with their pages."""
  pages = dict(cache=dict(dtype="int8"), preemption=preemption)
  prompts = [*PROMPTS, (1, 2, 3, 9), tuple(range(4, 12)), (3,) * 15]
  e = engine(**pages, options=dict(prefix_cache=False))
  alone = [e.generate([p], Sampling(max_new_tokens=12))[0][0].tokens for p in prompts]
  assert sum(a == tiny.greedy(p, 12) for a, p in zip(alone, prompts)) > len(prompts) / 2
  crowded = engine(**pages, num_pages=8)
  got = crowded.generate(prompts, Sampling(max_new_tokens=12, num_samples=2))
  assert [[c.tokens for c in each] for each in got] == [[text] * 2 for text in alone]
  done = crowded.counts
  assert (done.swaps if preemption == "swap" else done.recomputations) and done.cached_tokens
  finish(crowded)


@st.composite
def stories(draw):
  """Settings of an engine, and requests with the round in which each arrives."""
  num_steps, drafter = draw(st.sampled_from([(1, None), (4, PromptLookup(3))]))
  setting = dict(
    num_steps=num_steps,
    preemption=draw(st.sampled_from(["swap", "recompute"])),
    num_pages=draw(st.sampled_from([8, 9, 13, 24])),
    drafter=drafter,
    options=dict(
      prefix_cache=draw(st.booleans()), num_host_pages=draw(st.sampled_from([0, 3, 64]))
    ),
  )
  shared = tuple(range(10))
  requests = []
  for _ in range(draw(st.integers(1, 7))):
    prompt = shared[: draw(st.integers(0, 10))] + tuple(
      draw(st.lists(st.integers(0, tiny.VOCABULARY - 1), min_size=1, max_size=9))
    )
    most = 33 - len(prompt)  # eight pages
    num_samples = draw(st.sampled_from([1, 1, 1, 3]))
    beams = draw(st.sampled_from([1, 2])) if setting["num_pages"] > 16 and num_samples == 1 else 1
    requests.append(
      dict(
        arrival=draw(st.integers(0, 6)),
        prompt=prompt,
        sampling=Sampling(
          max_new_tokens=draw(st.integers(1, min(12, most))),
          num_samples=num_samples,
          num_beams=beams,
          stop_tokens=tuple(draw(st.lists(st.integers(0, 30), max_size=2))),
        ),
        priority=draw(st.integers(0, 2)),
      )
    )
  forced = draw(st.lists(st.booleans(), min_size=8, max_size=8))  # preempt the last one then
  return setting, requests, forced


@pytest.mark.timeout(180)  # it compiles the programs of two kinds of engine
@settings(max_examples=30, deadline=None, derandomize=True)
@given(stories())
def test_any_mix_of_requests_gives_each_its_own_text(story):
  setting, requests, forced = story
  e = engine(max_beams=4, **setting)
  handles = {}
  for turn in range(2000):
    for n, request in enumerate(requests):
      if request["arrival"] == turn:
        handles[n] = e.submit(request["prompt"], request["sampling"], priority=request["priority"])
    if turn < len(forced) and forced[turn] and e._queue.running:
      force_preemption(e)
    if not e.step() and len(handles) == len(requests) and turn >= len(forced):
      break
  finish(e)
  for n, request in enumerate(requests):
    wanted = request["sampling"]
    asked = (wanted.max_new_tokens, wanted.stop_tokens)
    want = [tiny.greedy(request["prompt"], *asked)] * wanted.num_samples
    if wanted.num_beams > 1:
      want = [text for text, _ in tiny.search(request["prompt"], wanted.num_beams, *asked)]
    assert handles[n].done
    assert handles[n].tokens == want


def test_sampled_text_depends_on_the_seed_and_not_on_the_batch():
  hot = [Sampling(max_new_tokens=10, temperature=4.0, seed=seed) for seed in range(6)]
  alone = [engine().generate([p], s)[0][0].tokens for p, s in zip(PROMPTS, hot)]
  crowded = engine(num_pages=11).generate(PROMPTS, hot)
  assert [c[0].tokens for c in crowded] == alone
  many = engine().generate(
    [PROMPTS[0]], Sampling(max_new_tokens=10, temperature=4.0, num_samples=3)
  )
  each = [engine().generate([PROMPTS[0]], s)[0][0].tokens for s in hot[:3]]
  assert [c.tokens for c in many[0]] == each
  assert len({*map(tuple, each)}) > 1


def test_end_tokens_and_stop_strings_end_a_sample():
  text = tiny.greedy((1, 2, 3), 20)
  token = text[6]
  want = text[: text.index(token) + 1]
  for e, wanted in (
    (engine(eos=(token,)), Sampling(max_new_tokens=20)),
    (engine(), Sampling(max_new_tokens=20, stop_tokens=(token,))),
  ):
    (done,) = e.generate([(1, 2, 3)], wanted)[0]
    assert (done.tokens, done.reason) == (want, "stop")
    finish(e)
  letters = Words().decode(text)
  stop = letters[5:7]
  e = engine()
  (done,) = e.generate([(1, 2, 3)], Sampling(max_new_tokens=20, stop=(stop,)))[0]
  assert done.text == letters[: letters.index(stop)]
  assert done.reason == "stop"
  finish(e)


def test_shared_beginnings_are_computed_once():
  e = engine()
  system = tuple(range(16))
  prompts = [(*system, 20 + i) for i in range(4)]
  got = e.generate(prompts, Sampling(max_new_tokens=6))
  assert [c[0].tokens for c in got] == [tiny.greedy(p, 6) for p in prompts]
  assert e.counts.cached_tokens == 3 * 16
  assert e.counts.prompt_tokens == 17 + 3  # the last token of each is its own
  again = e.generate([(*prompts[0], *got[0][0].tokens)], Sampling(max_new_tokens=3))
  assert again[0][0].tokens == tiny.greedy((*prompts[0], *got[0][0].tokens), 3)
  assert e.counts.prompt_tokens == 17 + 3 + 1  # generated text is found, too
  finish(e)


def test_a_prompt_that_is_cached_with_its_logits_is_not_computed_again():
  e = engine()
  prompts = [tuple(range(8)), tuple(range(10, 21))]  # one ends a page, one does not
  first = e.generate(prompts, Sampling(max_new_tokens=6))
  computed = e.counts.prompt_tokens
  again = e.generate(prompts, Sampling(max_new_tokens=6))
  assert [c[0].tokens for c in again] == [tiny.greedy(p, 6) for p in prompts]
  assert again == first  # log-probabilities, too
  assert e.counts.prompt_tokens == computed
  hot = Sampling(max_new_tokens=6, temperature=2.0, seed=5)
  assert e.generate(prompts, hot) == engine().generate(prompts, hot)
  finish(e)


def test_a_request_that_shares_its_last_page_with_the_cache_alone_gets_it():
  e = engine(num_pages=3)
  prompt = tuple(range(9))  # three pages, the last one is kept for whoever asks the same
  e.generate([prompt], Sampling(max_new_tokens=1))
  (done,) = e.generate([prompt], Sampling(max_new_tokens=4))[0]
  assert done.tokens == tiny.greedy(prompt, 4)
  finish(e)


def test_a_prompt_is_stored_when_somebody_waits_who_begins_alike_or_when_it_ends():
  e = engine()
  first = e.submit((*range(9), 20), Sampling(max_new_tokens=20))
  other = e.submit((7,) * 9, Sampling(max_new_tokens=20))
  for _ in range(3):
    e.step()
  assert first.tokens[0] and e.manager.prefix_stats().entries == 0
  alike = e.submit((*range(9), 21), Sampling(max_new_tokens=3))
  e.step()
  assert alike.num_cached == 8 and e.manager.prefix_stats().entries == 1
  finish(e)
  assert (first.tokens[0], other.tokens[0], alike.tokens[0]) == (
    tiny.greedy((*range(9), 20), 20), tiny.greedy((7,) * 9, 20), tiny.greedy((*range(9), 21), 3)
  )  # fmt: skip


def test_who_is_to_be_computed_again_finds_what_is_left_of_its_pages():
  e = engine(preemption="recompute")
  handle = e.submit(range(10), Sampling(max_new_tokens=9))
  e.step()
  e.step()
  force_preemption(e)
  finish(e)
  assert handle.tokens == [tiny.greedy(range(10), 9)]
  assert e.counts.recomputations == 1 and e.counts.cached_tokens >= 8


def test_nobody_is_admitted_while_the_prompts_on_rows_fill_the_next_call():
  e = engine()  # a call takes 16 tokens of prompts
  e.submit((1,) * 40, Sampling(max_new_tokens=3))
  e.step()
  late = e.submit((2, 3), Sampling(max_new_tokens=3))
  e.step()  # 24 are left before it
  assert e.num_waiting == 1
  e.step()  # 8 are
  assert e.num_waiting == 0
  finish(e)
  assert late.tokens == [tiny.greedy((2, 3), 3)]


def test_who_found_no_row_is_admitted_once_there_is_one_however_many_pages_are_free():
  e = engine()
  long = [e.submit((n,), Sampling(max_new_tokens=40)) for n in range(7)]
  short = e.submit((8,), Sampling(max_new_tokens=6))
  last = e.submit((9,), Sampling(max_new_tokens=2))
  while not short.done:
    e.step()
  for _ in range(3):
    e.step()
  assert last.tokens[0] and not any(handle.done for handle in long)
  finish(e)


def test_samples_of_a_request_share_its_pages():
  e = engine(num_pages=12, options=dict(prefix_cache=False))
  prompt = tuple(range(16))
  (done,) = e.generate([prompt], Sampling(max_new_tokens=4, num_samples=4))
  assert [c.tokens for c in done] == [tiny.greedy(prompt, 4)] * 4
  assert e.counts.peak_running == 4  # 20 pages, were nothing shared
  assert e.counts.prompt_tokens == 16
  finish(e)


# Streams and threads


def test_streams_run_side_by_side_and_a_listener_that_leaves_cancels():
  e = engine()

  async def listen(prompt, most=None):
    got = []
    async for token in e.stream(prompt, Sampling(max_new_tokens=12)):
      got.append(token.token)
      if len(got) == most:
        break
    return got

  async def everybody():
    return await asyncio.gather(*map(listen, PROMPTS), listen((9, 9), 2))

  try:
    *whole, cut = asyncio.run(asyncio.wait_for(everybody(), 120))
  finally:
    e.close()
  assert whole == [tiny.greedy(p, 12) for p in PROMPTS]
  assert cut == tiny.greedy((9, 9), 12)[:2]
  finish(e)


def test_a_round_that_fails_ends_all_streams(monkeypatch):
  e = engine(num_steps=1)

  def broken():
    raise MemoryError("no more")

  async def listen():
    async for _ in e.stream(PROMPTS[0], Sampling(max_new_tokens=40)):
      monkeypatch.setattr(e._scheduler, "pieces", broken)

  with pytest.raises(RuntimeError, match="no more"):
    asyncio.run(asyncio.wait_for(listen(), 60))
  with pytest.raises(RuntimeError, match="the engine has failed"):
    e.submit(PROMPTS[1], Sampling(max_new_tokens=12))
  e.close()


# What a call costs


@pytest.mark.timeout(180)  # it compiles all programs of an engine
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_rows_change_hands_while_a_call_is_unread(prefix_cache, monkeypatch):
  e = engine(options=dict(prefix_cache=prefix_cache))
  unread, allocate = [], e.manager.allocate_many

  def allocate_many(requests, **options):
    unread.append(len(e._calls))
    return allocate(requests, **options)

  monkeypatch.setattr(e.manager, "allocate_many", allocate_many)
  prompts = [(n, *range(n % 5)) for n in range(20)]
  wanted = [Sampling(max_new_tokens=3 + 9 * (n % 4)) for n in range(20)]
  got = e.generate(prompts, wanted)
  for prompt, each, (done,) in zip(prompts, wanted, got):
    assert done.tokens == tiny.greedy(prompt, each.max_new_tokens)
  assert unread[0] == 0 and unread.count(1) >= 3
  finish(e)


def test_a_compilation_is_found(compiled):
  jax.jit(lambda x: x + len(compiled) + 17)(np.float32(1))
  assert compiled


class Sealed:
  """What the device has, for whoever does not look at it."""

  def __init__(self, arrays):
    self.arrays = arrays

  def __array__(self, *_, **__):
    raise AssertionError("the device was read")

  def __getattr__(self, name):
    raise AssertionError(f"the device was read: {name}")


def sealed(tree):
  return jax.tree.map(Sealed, tree)


def opened(tree):
  return jax.tree.map(lambda x: x.arrays if isinstance(x, Sealed) else x, tree)


def seal(e, monkeypatch):
  """Lets an engine hold nothing of the device but reports and logs."""
  run, verbs, state, calls = calls_lib._run, e.manager._state.verbs, e.manager._state, e._calls

  def sealed_run(cache, model, rows, past, *args, **kwargs):
    cache, log, (rows, past, report) = run(
      cache.arrays, model, rows.arrays, opened(past), *args, **kwargs
    )
    return Sealed(cache), log, (Sealed(rows), sealed(past), report)

  def sealed_verb(verb):
    def call(cache, *args):
      cache, *rest = verb(cache.arrays, *args)
      return Sealed(cache), *rest

    return call

  take, give = calls_lib._take, calls_lib._give
  monkeypatch.setattr(calls_lib, "_run", sealed_run)
  monkeypatch.setattr(calls_lib, "_take", lambda past, row: Sealed(take(opened(past), row)))
  monkeypatch.setattr(
    calls_lib, "_give", lambda past, row, x: sealed(give(opened(past), row, x.arrays))
  )
  names = ("extend", "fork", "free", "hold", "drop", "adopt", "trim")
  state.verbs = types.SimpleNamespace(**{n: sealed_verb(getattr(verbs, n)) for n in names})
  state.cache, calls._rows = map(Sealed, (state.cache, calls._rows))
  calls._past = sealed(calls._past)


def test_nothing_of_the_device_is_read_but_reports(monkeypatch):
  e = engine()
  seal(e, monkeypatch)
  wanted = [Sampling(max_new_tokens=12, num_samples=1 + i % 2) for i in range(len(PROMPTS))]
  for _ in range(2):  # the second time all prompts are cached, with their logits
    for prompt, done in zip(PROMPTS, e.generate(PROMPTS, wanted)):
      assert done[0].tokens == tiny.greedy(prompt, 12)


@pytest.mark.parametrize(
  "read",
  [
    lambda e: int(e.manager.cache.num_free),
    lambda e: np.asarray(e._calls._rows),
    lambda e: np.asarray(e._calls._past.seen),
  ],
)
def test_a_deliberate_read_is_found(read, monkeypatch):
  e = engine()
  seal(e, monkeypatch)
  with pytest.raises(AssertionError, match="the device was read"):
    read(e)


def test_a_call_has_no_host_callback():
  e = engine()
  calls = e._calls
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    (
      e.manager.cache,
      tiny.MODEL,
      calls._rows,
      calls._past,
      calls._edits(),
      calls.prompts([], 16),
    ),
  )
  traced = str(jax.make_jaxpr(functools.partial(program.run, num_steps=4))(*shapes))
  assert "callback" not in traced


# Preemption


@pytest.mark.parametrize(
  "swap_seconds, prompt_seconds, swaps", [(1.0, 1.0, True), (9.0, 1.0, False), (0.0, 0.0, True)]
)
def test_preemption_takes_what_costs_less(swap_seconds, prompt_seconds, swaps):
  e = engine(preemption="auto")
  e._scheduler.swap_seconds, e._scheduler.prompt_seconds = swap_seconds, prompt_seconds
  e.submit(tuple(range(9)), Sampling(max_new_tokens=9))
  e.step()
  ((_, sample),) = e._queue.running.items()
  assert e._scheduler.swaps(sample) == swaps  # 8 tokens on 2 pages, there and back
  finish(e)


# Faults


def test_cancel_at_any_moment_leaves_the_others_alone():
  for moment in range(8):
    e = engine(num_pages=13)
    handles = [e.submit(p, Sampling(max_new_tokens=12)) for p in PROMPTS]
    for _ in range(moment):
      e.step()
    handles[2].cancel()
    handles[4].cancel()
    finish(e)
    for n, (prompt, handle) in enumerate(zip(PROMPTS, handles)):
      want = tiny.greedy(prompt, 12)
      (tokens,) = handle.tokens
      assert handle.done
      assert tokens == (want[: len(tokens)] if n in (2, 4) else want)
      if n in (2, 4):
        assert handle.completions[0].reason in ("cancelled", "length")


def test_a_callback_that_raises_ends_its_own_request():
  e = engine()

  def broken(nth, tokens, logprobs):
    raise RuntimeError("no")

  bad = e.submit(PROMPTS[0], Sampling(max_new_tokens=9), on_token=broken)
  good = e.submit(PROMPTS[2], Sampling(max_new_tokens=9))
  finish(e)
  assert bad.completions[0].reason == "error" and "no" in bad.completions[0].error
  assert good.tokens == [tiny.greedy(PROMPTS[2], 9)]


def test_news_is_told_once_and_never_while_the_device_waits():
  e, heard = engine(), []

  def listen(n):
    return lambda nth, tokens, _: heard.append((n, tokens, handles[n].done, len(e._calls)))

  prompts = PROMPTS * 3
  handles = [
    e.submit(prompt, Sampling(max_new_tokens=4 + n % 5), on_token=listen(n))
    for n, prompt in enumerate(prompts)
  ]
  finish(e)
  assert [n for n, *_ in heard[:3]] == [0, 1, 2]  # of one call, in order
  for n, handle in enumerate(handles):
    mine = [(tokens, done) for m, tokens, done, _ in heard if m == n]
    assert [token for tokens, _ in mine for token in tokens] == handle.tokens[0]
    assert [done for _, done in mine].count(True) == 1
  last = max(i for i, (*_, flying) in enumerate(heard) if flying)
  assert all(flying for *_, flying in heard[:last])


def test_who_ended_before_a_round_failed_hears_of_the_end():
  e, heard = engine(), []
  e.submit(PROMPTS[0], Sampling(max_new_tokens=1), on_token=lambda *news: heard.append(news))
  e.step()
  e.submit(PROMPTS[1], Sampling(max_new_tokens=4))

  def broken(*args):
    raise RuntimeError("no")

  e._calls.dispatch = broken
  e._room.fits = lambda num_steps: False  # all reports are read before
  with pytest.raises(RuntimeError) as failure:
    e.step()
  e._fail(failure.value)
  assert [tokens for _, tokens, _ in heard] == [tiny.greedy(PROMPTS[0], 1)]


def test_logits_that_are_no_numbers_end_their_own_row():
  poisoned = tiny.model()
  embedding = poisoned.embedding.at[11].set(np.nan)  # whoever sees token 11 is lost
  model = tiny.dataclasses.replace(poisoned, embedding=embedding)
  model = Masked(model, 11)  # or every row would see the NaN in its logits
  e = engine(model=model)
  bad = e.submit((1, 11, 2), Sampling(max_new_tokens=5))
  good = e.submit((1, 2, 3), Sampling(max_new_tokens=5))
  finish(e)
  assert bad.completions[0].reason == "error"
  assert "not numbers" in bad.completions[0].error
  assert good.completions[0].reason == "length"
  alone = engine(model=model).generate([(1, 2, 3)], Sampling(max_new_tokens=5))
  assert good.tokens[0] == alone[0][0].tokens


@tiny.jax.tree_util.register_dataclass
@tiny.dataclasses.dataclass(frozen=True)
class Masked:
  """A model that never draws one token."""

  inner: tiny.Tiny
  token: int = tiny.dataclasses.field(metadata={"static": True})

  def __call__(self, tokens, cache, plan):
    return self.inner(tokens, cache, plan)

  def logits(self, hidden):
    return self.inner.logits(hidden).at[:, self.token].set(-1e9)


def test_a_pool_that_shrinks_is_lived_with():
  e = engine(num_pages=18, options=dict(prefix_cache=False))
  handles = [e.submit(p, Sampling(max_new_tokens=12)) for p in PROMPTS[:3]]
  e.step()
  e.manager.allocate(Request(("outsider", 0), min(8, e.manager.stats().free_pages) * SIZE))
  finish(e)
  assert [handle.tokens[0] for handle in handles] == [tiny.greedy(p, 12) for p in PROMPTS[:3]]


def test_pages_that_never_come_are_an_error_with_numbers():
  e = engine(num_pages=2, options=dict(prefix_cache=False))
  with pytest.raises(errors.OutOfPages):
    e.generate([tuple(range(12))], Sampling(max_new_tokens=4))


@pytest.mark.parametrize(
  "text, prompt, fields",
  [
    ("prompt is empty", (), {}),
    ("prompt has token 31", (31,), {}),
    ("prompt must be an integer, got True", (True,), {}),
    ("needs 50 tokens, but a row holds 48", (1,) * 40, dict(max_new_tokens=11)),
    ("logit_bias has token 99", (1,), dict(logit_bias={99: 1.0})),
    ("stop_tokens has token -1", (1,), dict(stop_tokens=(-1,))),
  ],
)
def test_impossible_requests_are_refused_at_submission(text, prompt, fields):
  e = engine()
  with pytest.raises(ValueError, match=text):
    e.submit(prompt, Sampling(**fields))
  assert not e.step()


def test_logprobs_are_those_of_the_model_whatever_the_request_changes():
  e = engine()
  changes = dict(repetition_penalty=1.7, logit_bias={3: 2.5, 7: 1.0}, temperature=1.3, top_k=9)
  wanted = Sampling(max_new_tokens=8, logprobs="model", **changes)
  ((done,),) = e.generate([PROMPTS[0]], wanted)
  text = tuple(PROMPTS[0])
  for token, logprob in zip(done.tokens, done.logprobs, strict=True):
    np.testing.assert_allclose(logprob, tiny.logprobs(text)[token], atol=1e-3)
    text = (*text, token)
  finish(e)
