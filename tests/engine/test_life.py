"""An engine's life: rounds from several threads, failures, its end, and what is left of it."""

import asyncio
import dataclasses
import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable

import equinox as eqx
import jax
import pytest
import tiny
from serving import PROMPTS, engine, finish

from paged_jax.engine import Engine, EngineConfig, Sampling
from paged_jax.host import Manager


def wanted(count):
  return Sampling(max_new_tokens=count)


def test_close_ends_every_stream_with_a_clear_error():
  e, heard = engine(num_steps=1), []

  async def listen():
    async for token in e.stream(PROMPTS[0], wanted(40)):
      heard.append(token)

  async def everything():
    task = asyncio.create_task(listen())
    while not heard:
      await asyncio.sleep(0.01)
    await asyncio.to_thread(e.close)
    await asyncio.wait_for(task, 30)

  with pytest.raises(RuntimeError, match="the engine was closed"):
    asyncio.run(everything())
  finish(e)  # rows and pages are given back


def test_close_ends_those_who_wait_and_refuses_those_who_come():
  told = []
  with engine() as e:
    handles = [e.submit(PROMPTS[i % 3], wanted(20), on_token=lambda *x: told.append(x)) for i in
               range(12)]  # fmt: skip
    e.step()
  assert all(handle.done for handle in handles) and len(told) >= len(handles)
  assert {h.completions[0].error for h in handles} == {"the engine was closed"}
  assert e.step() is False
  for call in (
    lambda: e.submit(PROMPTS[0], wanted(1)),
    lambda: e.generate([PROMPTS[0]], wanted(1)),
    e.start,
  ):
    with pytest.raises(RuntimeError, match="the engine is closed"):
      call()
  e.close()
  finish(e)


def test_generate_works_beside_the_own_thread_and_others():
  texts = {}
  with engine() as e:
    e.start()

    def ask(i):
      texts[i] = e.generate([PROMPTS[i]], wanted(12))[0][0].tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(120)
    assert e.failure is None
  assert texts == {i: tiny.greedy(PROMPTS[i], 12) for i in range(4)}


def test_step_from_within_a_round_is_refused_and_ends_only_the_caller():
  e = engine()
  bad = e.submit(PROMPTS[0], wanted(8), on_token=lambda *news: e.step())
  good = e.submit(PROMPTS[1], wanted(8))
  finish(e)
  assert "step must not be called from within a round" in bad.completions[0].error
  assert good.tokens == [tiny.greedy(PROMPTS[1], 8)]


def test_commands_of_a_listener_count_in_the_next_round():
  e, others = engine(num_steps=1), []

  def listen(nth, tokens, logprobs):
    if len(others) < 6:
      other = e.submit(PROMPTS[1], wanted(6))
      others.append(other)
      if len(others) % 2:
        other.cancel()
      else:
        other.rollback(0)

  handle = e.submit(PROMPTS[0], wanted(12), on_token=listen)
  finish(e)
  assert handle.tokens == [tiny.greedy(PROMPTS[0], 12)]
  assert [other.completions[0].reason for other in others] == ["cancelled", "length"] * 3
  assert all(other.tokens == [tiny.greedy(PROMPTS[1], 6)] for other in others[1::2])


def test_a_listener_that_cancels_and_raises_ends_its_own_request_alone():
  e = engine()

  def listen(*news):
    bad.cancel()
    raise ZeroDivisionError("mine")

  bad = e.submit(PROMPTS[0], Sampling(9, num_samples=2, temperature=1.0), on_token=listen)
  good = e.submit(PROMPTS[1], wanted(9))
  finish(e)
  assert [x.reason for x in bad.completions] == ["error"] * 2 and e.failure is None
  assert good.tokens == [tiny.greedy(PROMPTS[1], 9)]


def test_a_listener_may_close_the_engine_beside_the_own_thread():
  for _ in range(3):
    e = engine(num_steps=1)
    e.start()
    others = [e.submit(PROMPTS[0], wanted(20), on_token=lambda *news, e=e: e.close())]
    others.append(e.submit(PROMPTS[1], wanted(20)))
    thread = threading.Thread(target=lambda e=e: e.step())
    thread.start()
    thread.join(60)
    deadline = time.monotonic() + 60
    while not all(other.done for other in others) and time.monotonic() < deadline:
      time.sleep(0.01)
    assert {other.completions[0].error for other in others} == {"the engine was closed"}
    e.close()
    finish(e)


class Failing:
  """A tokenizer that fails for good at some call."""

  def __init__(self, error):
    self.error, self.calls = error, 0

  def decode(self, ids):
    self.calls += 1
    if self.calls > 4:
      raise self.error
    return "a" * len(ids)


class Panic(BaseException):
  """As extensions raise that are not written in Python."""


@pytest.mark.parametrize("error", [MemoryError("no more"), Panic("no more")])
def test_a_tokenizer_that_fails_ends_every_stream(error):
  e = Engine(tiny.MODEL, engine().config, tokenizer=Failing(error))

  async def listen():
    async for _ in e.stream(PROMPTS[0], wanted(20)):
      pass

  async def everybody():
    tasks = asyncio.gather(*[listen() for _ in range(3)], return_exceptions=True)
    return await asyncio.wait_for(tasks, 60)

  for failure in asyncio.run(everybody()):
    assert isinstance(failure, RuntimeError) and "no more" in str(failure)
  assert e.failure is error
  e.close()


def test_close_ends_everybody_although_the_device_is_gone():
  e = engine()
  handle = e.submit(PROMPTS[0], wanted(20))
  e.step()

  def gone():
    raise RuntimeError("the device is gone")

  e._calls.await_report = gone
  e.close()
  assert handle.completions[0].error == "the engine was closed" and e.failure is not None


def test_interrupts_leave_no_round_half_done():
  e, interrupted = engine(num_steps=1), 0
  for turn in range(60):
    timer = threading.Timer(0.002 * turn, signal.raise_signal, [signal.SIGINT])
    try:
      timer.start()
      e.generate([PROMPTS[turn % 3], PROMPTS[3]], wanted(30))
      timer.join()
      time.sleep(0.01)
    except KeyboardInterrupt:
      interrupted += 1
    assert e.failure is None
  assert interrupted
  assert e.generate([PROMPTS[0]], wanted(12))[0][0].tokens == tiny.greedy(PROMPTS[0], 12)
  finish(e)


def test_a_round_that_only_reads_reports_is_not_the_last():
  e = engine(num_pages=11, num_steps=1, options=dict(prefix_cache=False))
  for turn in range(12):
    prompts = [PROMPTS[(turn + i) % 4] for i in range(6)]
    found = e.generate(prompts, [Sampling(9 + i, num_samples=1 + i % 3) for i in range(6)])
    assert all(each.reason == "length" for samples in found for each in samples)
  finish(e)


def test_a_text_ends_where_the_model_does_not_where_its_last_page_does():
  config = tiny.cache(num_pages=40, num_rows=8, max_length=46)  # rows of 48
  e = Engine(tiny.MODEL, EngineConfig(config, tiny.options(), prompt_sizes=(16,)))
  with pytest.raises(ValueError, match="needs 47 tokens, but a row holds 46"):
    e.submit(PROMPTS[0], wanted(45))
  e.generate([PROMPTS[0]], wanted(44))
  finish(e)


def test_generate_returns_although_others_go_on():
  e = engine(num_steps=1)
  other = e.submit(PROMPTS[1], wanted(40))
  e.generate([PROMPTS[0]], wanted(1))
  assert not other.done
  finish(e)


def test_a_search_that_cannot_go_on_ends_as_a_whole():
  e = engine(num_pages=10, max_beams=4)
  e.generate([PROMPTS[4]], wanted(2))  # 5 pages
  assert e.manager.pin(PROMPTS[4])
  (found,) = e.generate([PROMPTS[0]], Sampling(20, num_beams=3))
  assert [beam.reason for beam in found] == ["error"] * 3
  e.manager.pin(PROMPTS[4], pinned=False)
  finish(e)


def test_a_round_that_fails_tells_everybody_and_stays_failed():
  e = engine()
  handle = e.submit(PROMPTS[0], wanted(8))
  e._scheduler.pieces = None
  with pytest.raises(TypeError):
    e.step()
  assert isinstance(e.failure, TypeError) and handle.done
  for call in (e.step, lambda: handle.fork(1), lambda: e.submit(PROMPTS[0], wanted(1))):
    with pytest.raises(RuntimeError, match="the engine has failed: TypeError"):
      call()
  e.close()


def threads():
  return {thread for thread in threading.enumerate() if thread.name.startswith(("engine", "twin"))}


def test_nothing_outlives_a_closed_engine_and_manager():
  before = threads()
  with engine() as e:
    e.start()
    e.generate([PROMPTS[0]], wanted(4))
    manager, gone = e.manager, weakref.ref(e)
  manager.close()
  del e
  gc.collect()
  assert gone() is None and threads() <= before


def test_an_engine_that_nobody_has_ends_its_thread():
  before = threads()
  e = engine()
  e.start()
  e.generate([PROMPTS[0]], wanted(4))
  gone = weakref.ref(e)
  del e
  deadline = time.monotonic() + 20
  while (gone() or not threads() <= before) and time.monotonic() < deadline:
    gc.collect()
    time.sleep(0.1)
  assert gone() is None and threads() <= before


def test_a_closed_manager_is_collected():
  with Manager(tiny.cache(), tiny.options()) as manager:
    gone = weakref.ref(manager)
  del manager
  gc.collect()
  assert gone() is None


def test_a_second_engine_on_the_same_model_compiles_nothing(compiled):
  def serve():
    with engine(max_beams=4) as e:
      e.warm_up()
      e.generate(PROMPTS[:3], [wanted(6), Sampling(6, num_samples=2), Sampling(6, num_beams=2)])

  serve()
  compiled.clear()
  serve()
  assert not compiled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Module:
  """Like a module of Equinox: leaves that are no arrays."""

  inner: tiny.Tiny
  squash: object
  scale: float

  def __call__(self, tokens, cache, plan):
    hidden, cache = self.inner(tokens, cache, plan)
    return self.squash(hidden) * self.scale, cache

  def logits(self, hidden):
    return self.inner.logits(hidden)


def test_a_model_with_leaves_that_are_no_arrays_is_served():
  def same(x):
    return x if isinstance(x, jax.Array) else None

  e = engine(model=Module(tiny.MODEL, same, 1.0), num_steps=1)
  assert e.generate([PROMPTS[0]], wanted(8))[0][0].tokens == tiny.greedy(PROMPTS[0], 8)
  finish(e)


class Equinox(eqx.Module):
  """A real one, with a function, a number and a size among its leaves."""

  inner: tiny.Tiny
  squash: Callable
  scale: float
  heads: int

  def __call__(self, tokens, cache, plan):
    hidden, cache = self.inner(tokens, cache, plan)
    return self.squash(hidden).reshape(len(hidden) * (self.heads - 3), -1), cache

  def logits(self, hidden):
    return self.inner.logits(hidden) * self.scale


def test_a_module_of_equinox_is_served():
  e = engine(model=Equinox(tiny.MODEL, lambda x: x, 1.0, 4), num_steps=1)
  assert e.generate([PROMPTS[2]], wanted(8))[0][0].tokens == tiny.greedy(PROMPTS[2], 8)
  finish(e)


def test_a_model_with_a_leaf_that_cannot_be_compiled_in_is_refused():
  class Unhashable:
    __hash__ = None

    def __repr__(self):
      return "<a leaf>"

  with pytest.raises(ValueError, match=r"model has a leaf <a leaf>.* a static field"):
    engine(model=Module(tiny.MODEL, Unhashable(), 1.0))


def test_pinned_prefixes_are_never_dropped_under_pressure():
  e = engine(num_pages=10, options=dict(min_prefix_length=1))
  e.generate([PROMPTS[4]], wanted(2))
  assert e.manager.pin(PROMPTS[4])
  done = e.generate([(*PROMPTS[4], 7), PROMPTS[2], PROMPTS[2]], wanted(16))
  assert all(each.reason in ("length", "error") for (each,) in done)
  assert e.manager.find_prefix(PROMPTS[4]).length == len(PROMPTS[4])
  e.manager.pin(PROMPTS[4], pinned=False)
  finish(e)


def test_whoever_cannot_go_on_for_what_is_pinned_ends_with_an_error():
  e = engine(num_pages=8)  # 32 tokens
  e.generate([PROMPTS[4]], wanted(2))  # 5 pages
  assert e.manager.pin(PROMPTS[4])
  ((done,),) = e.generate([PROMPTS[1]], wanted(20))
  assert done.reason == "error" and "pages are needed, but" in done.error
  needed, free = map(int, [x for x in done.error.split() if x.isdigit()])
  assert needed > free
  assert done.tokens == tiny.greedy(PROMPTS[1], 20)[: len(done.tokens)] and done.tokens
  assert e.manager.find_prefix(PROMPTS[4]).length == len(PROMPTS[4])
  e.manager.pin(PROMPTS[4], pinned=False)
  finish(e)


class Narrow(Module):
  """Knows three tokens."""

  def logits(self, hidden):
    return self.inner.logits(hidden)[:, :3]


jax.tree_util.register_dataclass(Narrow, ["inner", "squash", "scale"], [])


def test_beams_for_which_there_is_no_text_say_so():
  e = engine(model=Narrow(tiny.MODEL, lambda x: x, 1.0), max_beams=5, num_steps=1)
  (found,) = e.generate([(1, 2)], Sampling(max_new_tokens=1, num_beams=5))
  assert [beam.reason for beam in found] == ["length"] * 3 + ["surplus"] * 2
  assert [(x.tokens, x.text, x.error) for x in found[3:]] == [([], "", None)] * 2
  assert sorted(x.tokens[0] for x in found[:3]) == [0, 1, 2]
  (more,) = e.generate([(1, 2)], Sampling(max_new_tokens=3, num_beams=5))
  assert [beam.reason for beam in more] == ["length"] * 5  # by then there are enough
  finish(e)


def test_audit_finds_what_nobody_owns():
  e = engine(num_steps=1)
  handle = e.submit(PROMPTS[2], wanted(12))
  e.step()
  e.step()
  assert e.audit().clean
  (sample,) = handle._request.samples
  row = sample.row
  del e._queue.running[row]
  lost = e.audit()
  assert not lost.clean and lost.lost == lost.sequences == 1 and lost.pages >= 3
  e._queue.waiting.add(sample)
  sample.completion = True
  assert e.audit().late == 1
  e._queue.waiting.remove(sample)
  sample.completion = None
  e._queue.running[row] = sample
  finish(e)


def test_engine_is_a_context_manager_that_gives_itself():
  e = engine()
  with e as same:
    assert same is e and isinstance(e, Engine)
