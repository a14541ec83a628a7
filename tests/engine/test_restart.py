"""An engine after a restart: what others have computed is there, and its own text comes out."""

import threading
import time

import pytest
import tiny
from serving import PROMPTS, engine, finish

from paged_jax.engine import Sampling
from paged_jax.host import FileStore

LONG = tuple(range(4, 21))
SHORT = Sampling(max_new_tokens=6)


def test_a_restarted_engine_computes_nothing_of_a_stored_prompt(tmp_path, compiled):
  e = engine()
  e.generate([LONG], SHORT)
  e.generate([LONG], SHORT)  # what a hit needs is compiled
  saved = e.save_prefixes(tmp_path / "prefixes")
  assert saved.num_prefixes == 2  # the prompt with its logits, and the text
  finish(e)
  later = engine()
  assert later.load_prefixes(str(tmp_path / "prefixes"))[:2] == saved[:2]
  del compiled[:]
  handle = later.submit(LONG, SHORT)
  while later.step():
    pass
  assert handle.num_cached == len(LONG) and later.counts.prompt_tokens == 0 and not compiled
  assert handle.tokens == [tiny.greedy(LONG, 6)]
  finish(later)


def test_text_on_loaded_prefixes_is_that_of_one_request_at_a_time(tmp_path):
  e, store = engine(), FileStore(tmp_path)
  e.generate(PROMPTS, SHORT)
  e.save_prefixes(store)
  for num_pages in (8, 24):  # nearly no room, and room for all
    later = engine(num_pages=num_pages)
    later.load_prefixes(store)
    got = later.generate(PROMPTS, Sampling(max_new_tokens=12))
    assert [c[0].tokens for c in got] == [tiny.greedy(p, 12) for p in PROMPTS]
    finish(later)
    assert num_pages == 8 or later.counts.cached_tokens


def test_another_model_finds_nothing(tmp_path, caplog):
  e = engine()
  e.generate([LONG], SHORT)
  e.save_prefixes(tmp_path)
  other = engine(model=tiny.model(2))
  assert other.load_prefixes(tmp_path)[::3] == (0, 2)
  assert caplog.text.count("it has weights") == 2
  named = engine(model=tiny.model(2))
  e.save_prefixes(tmp_path, fingerprint="mine")
  assert named.load_prefixes(tmp_path, fingerprint="mine").num_prefixes == 2


def test_saves_and_loads_beside_a_running_service(tmp_path):
  e, errors = engine(), []

  def persist():
    try:
      for _ in range(6):
        e.save_prefixes(tmp_path)
        e.load_prefixes(tmp_path)
    except BaseException as error:
      errors.append(error)

  e.start()
  threads = [threading.Thread(target=persist) for _ in range(2)]
  for thread in threads:
    thread.start()
  for _ in range(3):
    handles = [e.submit(prompt, SHORT) for prompt in PROMPTS]
    for handle in handles:
      while not handle.done:
        time.sleep(0.001)
    assert [handle.tokens[0] for handle in handles] == [tiny.greedy(p, 6) for p in PROMPTS]
  for thread in threads:
    thread.join()
  assert not errors and e.failure is None
  assert e.audit().clean
  e.close()
  assert e.save_prefixes(tmp_path).num_prefixes > 0


def test_a_load_from_within_a_round_is_refused(tmp_path):
  e, said = engine(), []

  def on_token(*_):
    with pytest.raises(RuntimeError, match="must not be called from within a round"):
      e.load_prefixes(tmp_path)
    said.append(e.save_prefixes(tmp_path).num_missed)

  e.submit(LONG, SHORT, on_token=on_token)
  while e.step():
    pass
  assert said and not any(said)
  finish(e)
