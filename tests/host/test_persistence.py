"""Prefixes in a store: what comes back, bit for bit, what does not and why, and in how much room."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from managed import Clock, Story, begin, check_bytes, each_stats, fingerprints, manager, store
from story import config

from paged_jax import sharding
from paged_jax.host import FileStore, Persisted, Request, persistence, records

SMALL = config(num_layers=1, num_pages=12, max_length=32)
WINDOW = dataclasses.replace(SMALL, num_pages=9, window=6)
CACHES = {
  "full": SMALL,
  "int8": dataclasses.replace(SMALL, dtype="int8"),
  "full, window": (SMALL, WINDOW),
  "window": WINDOW,
  "two page sizes, int8": (
    dataclasses.replace(WINDOW, page_size=2, num_pages=16), dataclasses.replace(SMALL, dtype="int8")
  ),
}  # fmt: skip
TWENTY, OTHER = list(range(40, 60)), [*range(40, 50), *[7] * 6]
LOGITS = np.arange(3, dtype=np.float32)


def made(caches=SMALL, **options):
  room = dict(low_watermark=0.1, high_watermark=0.0, num_host_pages=16)
  return manager(room | options, caches)


@pytest.fixture
def files(tmp_path):
  return FileStore(tmp_path / "prefixes")


def found(m, tokens, **fields):
  """Cached tokens of a new sequence, which reads back what a model would have written."""
  handle = begin(m, tokens, "asks", **fields)
  check_bytes(m, handle, tokens)
  m.deallocate("asks")
  assert m.audit().clean
  return handle.num_cached


# What comes back


@pytest.mark.parametrize("name", CACHES)
def test_a_saved_prefix_is_found_whole_with_its_logits(files, name):
  m, later = made(CACHES[name]), made(CACHES[name])
  assert store(m, TWENTY, last_logits=LOGITS)
  saved = m.save_prefixes(files, "w")
  loaded = later.load_prefixes(files, "w")
  pages = [each.used_pages for each in each_stats(m)]
  assert loaded[:2] == (1, sum(pages))
  assert (
    saved.num_prefixes == 1 and saved.num_bytes <= loaded.num_bytes
  )  # two groups wrote the same
  assert [each.used_pages for each in each_stats(later)] == pages
  handle = later.allocate(Request("again", tokens=TWENTY))
  assert handle.num_cached == 20
  np.testing.assert_array_equal(handle.last_logits, LOGITS)
  check_bytes(later, handle, TWENTY)
  assert later.audit().clean


def test_shared_pages_are_saved_and_loaded_once(files):
  m, later = made(), made()
  assert store(m, TWENTY) and store(m, OTHER)
  assert m.save_prefixes(files, "w")[:2] == (
    2,
    5 + 2,
  )  # they share two pages, not part of the third
  assert len([name for name in files.names() if name.startswith("page-")]) == 7
  assert later.load_prefixes(files, "w")[:2] == (2, 7)
  assert later.stats().used_pages == 7
  assert found(later, [*TWENTY, 1]) == 20 and found(later, OTHER) == 15
  assert found(later, [*range(40, 50), 9]) == 10


def test_a_second_save_writes_no_page_again(files):
  m = made()
  assert store(m, TWENTY)
  first = m.save_prefixes(files, "w")
  again = m.save_prefixes(files, "w")
  assert (first.num_pages, again.num_pages) == (5, 0) and again.num_prefixes == 1
  assert store(m, [*TWENTY, 1, 2, 3, 4], last_logits=LOGITS)
  assert m.save_prefixes(files, "w")[:2] == (2, 1)
  later = made()
  assert later.load_prefixes(files, "w").num_prefixes == 2
  assert later.load_prefixes(files, "w")[:2] == (2, 0)  # they are there
  assert later.save_prefixes(files, "w")[:2] == (2, 0)


def test_part_of_a_page_that_was_saved_is_not_the_page_that_took_its_place(files):
  m, later = made(), made()
  assert store(m, TWENTY[:5])  # the second page has one token
  m.save_prefixes(files, "w")
  assert store(m, TWENTY[:8])  # the index gives the first prefix this page, too
  assert m.save_prefixes(files, "w")[:2] == (2, 1)
  later.load_prefixes(files, "w")
  assert found(later, TWENTY[:9]) == 8 and found(later, [*TWENTY[:5], 1]) == 5


def test_an_entry_that_is_saved_again_has_the_newest_pin_and_logits(files):
  m, later = made(), made()
  assert store(m, TWENTY)
  m.save_prefixes(files, "w")
  assert store(m, TWENTY, last_logits=LOGITS, pinned=True)
  m.save_prefixes(files, "w")
  later.load_prefixes(files, "w")
  assert later.evict_prefixes(1) == 0
  assert later.find_prefix(TWENTY).last_logits is not None


@pytest.mark.parametrize("namespace", [None, "a", 3, True, 1.5, ("a", 1, ("b", None))])
def test_namespaces_stay_apart(files, namespace):
  m, later = made(), made()
  handle = begin(m, TWENTY, namespace=namespace)
  other = begin(m, OTHER, "b", namespace="other")
  assert m.store_prefix(handle) and m.store_prefix(other)
  assert m.save_prefixes(files, "w").num_prefixes == 2
  assert later.load_prefixes(files, "w").num_prefixes == 2
  assert found(later, TWENTY, namespace=namespace) == 19
  assert found(later, OTHER, namespace="other") == 15
  assert found(later, TWENTY, namespace="third") == 0


@pytest.mark.parametrize("namespace", [b"bytes", frozenset("a"), float("nan"), object()])
def test_a_namespace_that_json_cannot_keep_is_not_saved(files, namespace, caplog):
  m = made()
  assert m.store_prefix(begin(m, TWENTY, namespace=namespace))
  assert m.save_prefixes(files, "w") == Persisted(num_missed=1)
  assert "a prefix is not saved: its namespace" in caplog.text and files.names() == []


def test_lifetimes_go_on_while_no_process_runs(files, monkeypatch):
  now = 1000.0
  monkeypatch.setattr(persistence.time, "time", lambda: now)
  clock = Clock()
  m = made(clock=clock)
  assert store(m, TWENTY, ttl=60) and store(m, OTHER, ttl=20)
  clock.now = 10
  assert m.save_prefixes(files, "w").num_prefixes == 2
  now = 1030.0
  clock = Clock()
  later = made(clock=clock)
  assert later.load_prefixes(files, "w")[::3] == (1, 1)
  assert found(later, OTHER) == 10 and found(later, TWENTY) == 19
  clock.now = 21
  assert found(later, TWENTY) == 0


def test_the_order_of_use_is_kept(files):
  m, later = made(), made(max_prefixes=2)
  prompts = [[n] * 5 for n in range(4)]
  assert all(store(m, prompt) for prompt in prompts)
  m.find_prefix(prompts[0])
  m.save_prefixes(files, "w")
  assert later.load_prefixes(files, "w")[::3] == (2, 2)
  assert [found(later, prompt) for prompt in prompts] == [4, 0, 0, 4]
  third = made()
  third.load_prefixes(files, "w")
  assert third.evict_prefixes(1) and found(third, prompts[1]) == 0


def test_logits_that_are_no_numbers_are_left_out(files):
  m, later = made(), made()
  assert store(m, TWENTY, last_logits="the logits") and store(m, OTHER, last_logits=LOGITS)
  m.save_prefixes(files, "w")
  assert later.load_prefixes(files, "w").num_prefixes == 2
  assert later.find_prefix(TWENTY).last_logits is None
  assert later.find_prefix(OTHER).last_logits is not None


# Room


def test_loaded_prefixes_take_free_pages_only(files):
  m = made()
  assert store(m, TWENTY) and store(m, [1] * 8)
  m.save_prefixes(files, "w")
  later = made(low_watermark=0.25)  # 3 of 12 pages stay free
  assert store(later, [2] * 16)
  assert later.load_prefixes(files, "w")[::3] == (1, 1)  # the newest: there are five pages
  assert found(later, [1] * 8) == 7 and found(later, TWENTY) == 0
  assert found(later, [2] * 16) == 15


def test_with_spill_the_others_take_free_host_pages(files):
  m = made()
  assert store(m, TWENTY, last_logits=LOGITS) and store(m, [1] * 8)
  m.save_prefixes(files, "w")
  later = made(low_watermark=0.75, spill=True, num_host_pages=6)
  assert later.load_prefixes(files, "w").num_prefixes == 2
  assert later.stats().used_pages == 2 and later.stats().free_host_pages == 1
  assert later.audit().clean
  assert found(later, TWENTY) == 20 and found(later, [1] * 8) == 7
  small = made(low_watermark=0.75, spill=True, num_host_pages=4)
  assert small.load_prefixes(files, "w")[::3] == (1, 1)


@pytest.mark.parametrize(
  "meddle",
  [
    lambda m: m.clear_prefixes(),  # two pages that the index had
    lambda m: m.allocate(Request("long", 30)),  # free pages
    lambda m: store(m, TWENTY, "same"),
  ],
)
def test_a_prefix_whose_place_is_lost_while_it_is_read_is_not_loaded(files, monkeypatch, meddle):
  m, later = made(), made()
  assert store(m, TWENTY) and store(later, OTHER)
  m.save_prefixes(files, "w")
  get, once = files.get, iter([meddle])

  def read(name):
    if name.startswith("page-"):
      next(once, lambda m: None)(later)
    return get(name)

  monkeypatch.setattr(files, "get", read)
  assert later.load_prefixes(files, "w")[::3] == (0, 1)
  assert later.audit().clean
  assert later.load_prefixes(files, "w").num_missed <= 1
  assert found(later, [*TWENTY[:10], 3]) in (0, 10)


def test_live_sequences_stay_as_they_are(files):
  m = made()
  assert store(m, TWENTY)
  m.save_prefixes(files, "w")
  later = made()
  handle = begin(later, TWENTY[:14], "live")
  swapped = begin(later, [3] * 6, "swapped")
  later.swap_out(swapped)
  assert later.load_prefixes(files, "w").num_prefixes == 1
  check_bytes(later, handle, TWENTY[:14])
  later.swap_in(swapped)
  check_bytes(later, swapped, [3] * 6)
  assert later.audit().clean


@pytest.mark.parametrize("options", [dict(prefix_cache=False), dict(min_prefix_length=21)])
def test_a_manager_that_stores_no_such_prefix_loads_none(files, options):
  m = made()
  assert store(m, TWENTY)
  m.save_prefixes(files, "w")
  assert made(**options).load_prefixes(files, "w") == Persisted(num_missed=1)


def test_a_prefix_that_no_row_could_hold_is_not_loaded(files):
  m = made()
  assert store(m, TWENTY)
  m.save_prefixes(files, "w")
  short = made(dataclasses.replace(SMALL, max_length=16))
  assert short.load_prefixes(files, "w") == Persisted(num_missed=1)


def test_a_store_without_a_folder_is_empty(files):
  assert made().load_prefixes(files, "w") == Persisted()
  assert not files.folder.exists()


# Where and how pages are kept does not matter


@pytest.mark.parametrize(
  "fields",
  [
    dict(storage_head_dim=5, dtype="float16"), dict(storage_head_dim=3, dtype="int8"),
    dict(storage_head_dim=3, storage_dtype="float8_e4m3fn", dtype="float8_e4m3fn"),
    dict(storage_dtype="uint16", dtype="float16"), dict(num_pages=30, max_length=100),
  ],
)  # fmt: skip
def test_another_storage_finds_the_same_values(files, fields):
  plain = dataclasses.replace(SMALL, dtype=fields.get("dtype", "float32"))
  m, other = made(plain), made(dataclasses.replace(plain, **fields))
  assert store(m, TWENTY)
  m.save_prefixes(files, "w")
  assert other.load_prefixes(files, "w").num_prefixes == 1
  assert found(other, TWENTY) == 19
  back, third = FileStore(files.folder / "back"), made(plain)
  assert other.save_prefixes(back, "w").num_pages == 5
  assert sorted(back.names()) == sorted(files.names())  # the same bytes
  assert third.load_prefixes(back, "w").num_prefixes == 1 and found(third, TWENTY) == 19


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_mesh_saves_what_one_device_loads_and_the_other_way_round(files, dtype):
  """Two KV heads over four devices: each is kept twice, and saved once."""
  whole = dataclasses.replace(SMALL, dtype=dtype)
  mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  m, split = made(whole), made(sharding.split(whole, mesh))
  assert store(m, TWENTY)
  m.save_prefixes(files, "w")
  assert split.load_prefixes(files, "w").num_prefixes == 1 and found(split, TWENTY) == 19
  back, third = FileStore(files.folder / "back"), made(whole)
  assert split.save_prefixes(back, "w").num_pages == 5
  assert sorted(back.names()) == sorted(files.names())
  assert third.load_prefixes(back, "w").num_prefixes == 1 and found(third, TWENTY) == 19


def test_keys_alone_are_saved_too(files):
  keys = dataclasses.replace(SMALL, value_dim=1)
  m, later = made(keys), made(dataclasses.replace(keys, storage_head_dim=4))
  assert store(m, TWENTY)
  m.save_prefixes(files, "w")
  assert later.load_prefixes(files, "w").num_prefixes == 1 and found(later, TWENTY) == 19


# Misses


def one_line(caplog, *parts):
  (record,) = caplog.records
  assert record.name == "paged_jax.host.store" and record.levelname == "WARNING"
  assert all(part in record.message for part in parts), record.message
  caplog.clear()


@pytest.mark.parametrize(
  "fields",
  [
    dict(dtype="bfloat16"), dict(dtype="int8"), dict(head_dim=4), dict(num_layers=2),
    dict(num_kv_heads=1), dict(page_size=8), dict(window=6), dict(value_dim=2),
    dict(copy_on_write=False),
  ],
  ids=str,
)  # fmt: skip
def test_another_layout_is_a_miss(files, caplog, fields):
  m = made()
  assert store(m, TWENTY)
  m.save_prefixes(files, "w")
  other = made(dataclasses.replace(SMALL, **fields))
  assert other.load_prefixes(files, "w") == Persisted(num_missed=1)
  one_line(caplog, "entry-", "it has layout [{")
  assert len(files.names()) == 6  # another process may want it


def test_other_weights_are_a_miss(files, caplog):
  m = made()
  assert store(m, TWENTY)
  m.save_prefixes(files, "w")
  later = made()
  assert later.load_prefixes(files, "others") == Persisted(num_missed=1)
  one_line(caplog, "entry-", "it has weights 'w', and not 'others'")
  assert later.load_prefixes(files, "w").num_prefixes == 1


def test_another_format_is_a_miss(files, caplog, monkeypatch):
  m = made()
  assert store(m, TWENTY)
  monkeypatch.setattr(persistence, "FORMAT", 0)
  m.save_prefixes(files, "w")
  monkeypatch.undo()
  assert made().load_prefixes(files, "w") == Persisted(num_missed=1)
  one_line(caplog, "entry-", "it has format 0, and not 1")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder with two prefixes that share two pages, and managers to load it into."""
  folder = tmp_path_factory.mktemp("saved")
  m = made()
  assert store(m, OTHER) and store(m, TWENTY)
  m.save_prefixes(FileStore(folder), "w")
  return folder


def load_damaged(folder, caplog, changed):
  """Loads a folder in which one file was changed: nothing that is loaded is wrong."""
  later = made()
  done = later.load_prefixes(FileStore(folder), "w")
  one_line(caplog, changed.name.removesuffix(".safetensors"))
  assert done.num_missed == 1 and done.num_prefixes == 1
  (tokens,) = [
    tokens for tokens in (TWENTY, OTHER) if later.find_prefix(tokens).length == len(tokens)
  ]
  assert found(later, tokens) == len(tokens) - 1
  return later


def own_files(folder):
  """The two entries, and the last page of each."""
  for path in sorted(folder.glob("entry-*")):
    yield path
    about, _, _ = records.unpack(path.read_bytes())
    yield folder / f"{about['pages'][0][-1]}.safetensors"


@pytest.mark.parametrize("nth", range(4))
@pytest.mark.parametrize("change", ["nothing", "half", "header", "one less", "flipped", "another"])
def test_a_damaged_file_is_a_miss_and_a_line_of_the_log(saved, tmp_path, caplog, nth, change):
  folder = shutil.copytree(saved, tmp_path / "damaged")
  path = list(own_files(folder))[nth]
  data = path.read_bytes()
  others = [each for each in folder.iterdir() if each.name[:5] == path.name[:5] and each != path]
  path.write_bytes({
    "nothing": b"", "half": data[: len(data) // 2], "header": data[:8], "one less": data[:-1],
    "flipped": data[:-3] + bytes([data[-3] ^ 4]) + data[-2:], "another": others[0].read_bytes(),
  }[change])  # fmt: skip
  later = load_damaged(folder, caplog, path)
  is_page = path.name.startswith("page-")
  assert path.exists() != is_page  # so that the next save writes it again
  assert store(later, TWENTY) and store(later, OTHER)
  assert later.save_prefixes(FileStore(folder), "w")[:2] == (2, is_page)
  again = made()
  assert again.load_prefixes(FileStore(folder), "w").num_prefixes == 2
  assert found(again, TWENTY) == 19 and found(again, OTHER) == 15


@pytest.mark.parametrize("nth", [1, 3])
def test_a_missing_page_is_a_miss(saved, tmp_path, caplog, nth):
  folder = shutil.copytree(saved, tmp_path / "damaged")
  path = list(own_files(folder))[nth]
  path.unlink()
  load_damaged(folder, caplog, path)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("pages", [["page-0"]]), ("pages", [[]]), ("pages", 3), ("pages", []), ("pages", [["../../x"] * 5]),
    ("expires", "soon"), ("namespace", {"a": 1}), ("namespace", "another"), ("layout", None),
    ("weights", 3), ("format", None),
  ],
)  # fmt: skip
def test_an_entry_made_by_hand_is_a_miss(saved, tmp_path, caplog, field, value):
  folder = shutil.copytree(saved, tmp_path / "damaged")
  path = sorted(folder.glob("entry-*"))[0]
  about, arrays, _ = records.unpack(path.read_bytes())
  path.write_bytes(records.pack(about | {field: value}, arrays)[0])
  load_damaged(folder, caplog, path)


@pytest.mark.parametrize(
  "tokens", [np.arange(20), np.array([[1, 2]]), np.array([-1] * 20), np.array([1.5] * 20), None]
)
def test_an_entry_with_other_tokens_is_a_miss(saved, tmp_path, caplog, tokens):
  folder = shutil.copytree(saved, tmp_path / "damaged")
  path = sorted(folder.glob("entry-*"))[0]
  about, arrays, _ = records.unpack(path.read_bytes())
  arrays = {} if tokens is None else {"tokens": tokens}
  path.write_bytes(records.pack(about, arrays)[0])
  load_damaged(folder, caplog, path)


def test_a_page_of_another_shape_is_a_miss(saved, tmp_path, caplog):
  folder = shutil.copytree(saved, tmp_path / "damaged")
  path = sorted(folder.glob("entry-*"))[0]
  data, digest = records.pack({}, {"kv": np.zeros(3)})
  (folder / f"page-{digest}.safetensors").write_bytes(data)
  about, arrays, _ = records.unpack(path.read_bytes())
  about["pages"][0][-1] = f"page-{digest}"
  path.write_bytes(records.pack(about, arrays)[0])
  load_damaged(folder, caplog, path)


def test_a_folder_that_cannot_be_written_is_loaded_and_an_error_to_save(files, monkeypatch):
  m = made()
  assert store(m, TWENTY)
  m.save_prefixes(files, "w")

  def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")

  for function in ("unlink", "replace", "mkdir"):
    monkeypatch.setattr(f"pathlib.Path.{function}", refuse)
  assert made().load_prefixes(files, "w").num_prefixes == 1
  with pytest.raises(PermissionError):
    m.save_prefixes(files, "w")
  assert found(m, TWENTY) == 19


def test_an_error_in_the_middle_of_a_save_leaves_what_is_complete(files, monkeypatch):
  m = made()
  assert store(m, OTHER) and store(m, TWENTY)
  put, turns = files.put, iter([True, False])

  def fails(prefix):
    if next(turns):
      return put(prefix)
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files, "put", fails)
  with pytest.raises(OSError, match="No space left"):
    m.save_prefixes(files, "w")
  monkeypatch.undo()
  later = made()
  assert later.load_prefixes(files, "w")[::3] == (1, 0) and found(later, OTHER) == 15
  assert m.save_prefixes(files, "w").num_prefixes == 2


def test_a_page_that_left_the_store_during_a_save_is_written_again(files, monkeypatch):
  m, later = made(), made()
  assert store(m, OTHER) and store(m, TWENTY)  # they share two pages
  put, turns = files.put, iter([True])

  def put_and_lose(prefix):
    kept = put(prefix)
    if next(turns, False):
      for name in files.names():
        files.remove(name)
    return kept

  monkeypatch.setattr(files, "put", put_and_lose)
  assert m.save_prefixes(files, "w").num_prefixes == 2
  assert later.load_prefixes(files, "w")[::3] == (1, 0) and found(later, TWENTY) == 19


def test_a_prefix_that_a_group_has_in_part_is_not_saved(files):
  m = made(CACHES["full, window"])
  assert store(m, TWENTY)
  m.gc((0, 9))
  assert m.prefix_stats().entries == 1
  assert m.save_prefixes(files, "w") == Persisted(num_missed=1) and files.names() == []


def test_under_a_limit_the_prefixes_used_last_are_kept(files):
  m = made()
  for n in range(3):
    assert store(m, [n] * 8)
  m.save_prefixes(files, "w")
  files.max_bytes = sum(path.stat().st_size for path in files.folder.iterdir()) * 4 // 5
  m.save_prefixes(files, "w")
  later = made()
  assert later.load_prefixes(files, "w")[::3] == (2, 0)
  assert [found(later, [n] * 8) for n in range(3)] == [0, 7, 7]


def test_text_in_the_store_is_json_and_nothing_is_pickled(files):
  m = made()
  assert store(m, TWENTY, last_logits=LOGITS)
  m.save_prefixes(files, "w")
  for name in files.names():
    data = files.get(name)
    size = int.from_bytes(data[:8], "little")
    json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["about"])


# Histories with restarts against a plain list of what was saved


class Restarts(Story):
  """A story in which the process ends now and then, and another one loads what was saved."""

  def __init__(self, rng, made, files):
    super().__init__(rng, made())
    self.made, self.files = made, files
    self.known: set[tuple] = set()  # all that was ever stored

  def do_store(self):
    if (name := self.some()) is not None:
      handle, tokens = self.live[name]
      tokens = tokens[: self.rng.integers(len(tokens) + 1)]
      logits = np.float32(fingerprints(tokens)[-1]) if tokens else None
      if self.manager.store_prefix(handle, tokens, last_logits=logits):
        self.known.add(tuple(tokens))

  def do_save(self):
    self.manager.save_prefixes(self.files, "w")

  def do_load(self):
    self.manager.load_prefixes(self.files, "w")

  def do_restart(self):
    self.do_save()
    there = stored(self.manager)
    self.manager, self.live = self.made(), {}
    done = self.manager.load_prefixes(self.files, "w")
    back = stored(self.manager)
    assert back <= self.known and len(back) == done.num_prefixes
    assert there <= back or done.num_missed  # there was no room
    for tokens in back:
      assert self.manager.find_prefix(tokens).length == len(tokens)


def stored(m):
  """The tokens of each prefix that every group has whole."""
  pools = m._pools
  return {
    tuple(np.frombuffer(key, "<i4").tolist())
    for namespace, key in pools.stored()
    if all(count == len(held) for count, held in pools.has(namespace, key))
  }


def run(seed, caches, options, folder, num_steps):
  story = Restarts(
    np.random.default_rng(seed), lambda: made(caches, **options), FileStore(folder, 10**9)
  )
  for _ in range(num_steps):
    story.step()
    story.check()
  story.do_restart()
  story.end()
  return story


@pytest.mark.once
@pytest.mark.parametrize("name", CACHES)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), spill=st.booleans())
def test_a_history_with_restarts_keeps_every_byte(name, tmp_path_factory, seed, spill):
  folder = tmp_path_factory.mktemp("history")
  run(seed, CACHES[name], dict(spill=spill), folder, 40)


def test_nothing_compiles_for_a_load_after_warm_up(files, compiled):
  m = made()
  m.warm_up()
  assert store(m, TWENTY)
  m.save_prefixes(files, "w")
  del compiled[:]
  later = made()
  later.load_prefixes(files, "w")
  assert not compiled
