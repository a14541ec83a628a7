"""Eight threads on one manager: nothing is lost, nothing deadlocks, callbacks may call back."""

import threading

import numpy as np
import pytest
from managed import Story, check_bytes, manager

from paged_jax.host import Level, Request


class Shared(Story):
  """One thread's operations, on requests of its own."""

  alone = False  # whether something fits may change before it is asked for

  def do_collect(self):
    pass  # left to the main thread


def test_eight_threads_lose_nothing():
  m = manager(dict(spill=True), num_pages=60, num_rows=24)
  stories = [Shared(np.random.default_rng(i), m, prefix=f"{i}-") for i in range(8)]
  failures = []

  def work(story):
    try:
      for turn in range(60):
        story.step()
        if turn % 7 == 0:
          for name, (handle, tokens) in story.live.items():
            if not handle.is_swapped:
              check_bytes(m, handle, tokens)
              assert m.get_handle(name).cache_id == handle.cache_id
              break
    except BaseException as error:
      failures.append(error)
      raise

  threads = [threading.Thread(target=work, args=(story,)) for story in stories]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not failures
  assert m.audit().clean
  stats = m.stats()
  assert stats.running + stats.swapped == sum(len(story.live) for story in stories)
  for story in stories:
    for handle, tokens in story.live.values():
      if not handle.is_swapped:
        check_bytes(m, handle, tokens)
      m.deallocate(handle.request_id)
  m.clear_prefixes()
  assert m.stats().free_pages == 60 and m.stats().free_host_pages == 16
  assert m.audit().clean


def test_a_callback_may_call_anything_even_subscribe():
  m = manager(num_pages=9, num_rows=5)
  seen = []

  def collect(change):
    seen.append((change.left, change.entered))
    m.on_pressure(lambda later: seen.append(later.entered))
    m.gc()
    m.stats()
    if change.entered is Level.CRITICAL:
      m.deallocate("a")

  m.on_pressure(collect)
  m.allocate(Request("a", 24))
  m.allocate(Request("b", 12))
  assert (Level.LOW, Level.MEDIUM) not in seen  # 9 -> 3 of 9 free is still LOW
  assert seen[0] == (Level.LOW, Level.CRITICAL)
  assert m.stats().free_pages == 6
  assert m.check_pressure() is Level.LOW


@pytest.mark.parametrize("round", range(3))
def test_levels_arrive_in_order_from_many_threads(round):
  m = manager(num_pages=9, num_rows=5)
  changes = []
  m.on_pressure(changes.append)
  m.allocate(Request("held", 24))  # 6 of 9 pages: whoever comes next changes the level

  def work(name):
    for turn in range(25):
      try:
        m.allocate(Request((name, turn), 8))
      except Exception:
        continue
      m.deallocate((name, turn))

  threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  m.stats()
  assert changes
  assert sorted(changes[i].left == changes[i - 1].entered for i in range(1, len(changes)))[0]
