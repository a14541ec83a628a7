"""Files of records: names, limits, damage, processes that are killed or write at the same time."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from paged_jax.host import FileStore, records, store


def name(number, kind="page"):
  return f"{kind}-{number:064x}"


def file_of(folder, number, kind="page"):
  return folder / f"{name(number, kind)}.safetensors"


def put(files, *numbers, size=100):
  return files.put({name(number): bytes([number]) * size for number in numbers})


@pytest.fixture
def files(tmp_path):
  return FileStore(tmp_path / "a" / "b")


def test_what_is_put_is_found_the_newest_first(files):
  assert files.names() == [] and files.get(name(1)) is None
  assert put(files, 1) and put(files, 2, 3)
  assert files.names() == [name(2), name(3), name(1)]  # of one put the last goes first
  assert files.get(name(3)) == bytes([3]) * 100
  assert files.put({name(1): None})
  assert files.names()[0] == name(1)
  files.remove(name(1))
  files.remove(name(1))
  assert files.get(name(1)) is None


def test_files_are_for_their_owner_alone(files):
  put(files, 1)
  assert file_of(files.folder, 1).stat().st_mode & 0o777 == 0o600
  assert files.folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("bad", ["../page", "page-", "page-" + 63 * "0" + "G", "x" + name(1), ""])
def test_a_name_that_leads_elsewhere_is_no_record(files, bad):
  assert files.get(bad) is None
  with pytest.raises(ValueError, match="name must be entry- or page- and 64 hexadecimal digits"):
    files.put({bad: b""})


@pytest.mark.parametrize("bad", [0, -1, True, 1.5])
def test_a_bad_limit_is_named(bad):
  with pytest.raises(ValueError, match="max_bytes must be a positive integer, got"):
    FileStore("anywhere", max_bytes=bad)


def test_the_oldest_go_when_the_limit_is_reached(files, caplog):
  files.max_bytes = 350
  put(files, 1), put(files, 2), put(files, 3)
  files.put({name(1): None})
  put(files, 4)
  assert sorted(files.names()) == [name(1), name(3), name(4)]
  put(files, 4, size=150)  # written again: the old one does not count
  assert sorted(files.names()) == [name(1), name(3), name(4)]
  assert not put(files, 5, 6, size=176)
  assert "exceeds 350 bytes" in caplog.text and name(6) in caplog.text
  assert not files.put({name(1): None, name(3): None, name(4): None, name(5): b"x"})
  assert sorted(files.names()) == [name(1), name(3), name(4)]


def test_an_entry_goes_before_its_pages(files):
  files.put({name(1): b"1" * 100, name(2): b"2" * 100, name(3, "entry"): b"3" * 100})
  left = []
  for limit in (299, 199, 99):
    files.max_bytes = limit
    files.put({})
    left.append(sorted(files.names()))
  assert left == [[name(1), name(2)], [name(1)], []]


def test_links_folders_and_others_files_are_no_records(files, tmp_path, caplog):
  put(files, 1)
  secret = tmp_path / "secret"
  secret.write_bytes(b"secret")
  file_of(files.folder, 2).symlink_to(secret)
  file_of(files.folder, 3).mkdir()
  os.mkfifo(file_of(files.folder, 4))
  (files.folder / "notes.safetensors").write_bytes(b"")
  assert files.names() == [name(1)]
  assert [files.get(name(number)) for number in (2, 3, 4)] == [None] * 3
  for number in (2, 3, 4):
    assert f"{file_of(files.folder, number)} is not used: " in caplog.text


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
  (tmp_path / "file").write_bytes(b"")
  with pytest.raises(NotADirectoryError):
    FileStore(tmp_path / "file").names()
  with pytest.raises(FileExistsError):
    put(FileStore(tmp_path / "file"), 1)


def test_what_a_killed_process_left_half_written_is_removed_later(files):
  put(files, 1)
  old, new = (files.folder / f".{name(2)}.safetensors.{n}{store._NEW}" for n in "ab")
  for path in (old, new):
    path.write_bytes(b"half")
  os.utime(old, (time.time() - 2 * store._STALE,) * 2)
  assert files.names() == [name(1)]
  put(files, 3)
  assert not old.exists() and new.exists()


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_is_an_error_and_changes_nothing(files, monkeypatch, call):
  put(files, 1, 2)

  def full(*_):
    raise OSError(28, "No space left on device")

  if call == "write":
    real = os.fdopen

    class Full:
      def __init__(self, file):
        self.file = file

      def __enter__(self):
        return self

      def __exit__(self, *_):
        self.file.close()

      def write(self, data):
        self.file.write(data[:1])
        full()

    monkeypatch.setattr(store, "open", lambda file, mode: Full(real(file, mode)), raising=False)
  elif call == "fsync":
    monkeypatch.setattr(os, "fsync", full)
  else:
    monkeypatch.setattr(pathlib.Path, "replace", full)
  with pytest.raises(OSError, match="No space left"):
    put(files, 1, 3, size=50)
  monkeypatch.undo()
  assert sorted(files.names()) == [name(1), name(2)]
  assert files.get(name(1)) == bytes([1]) * 100
  assert len(list(files.folder.iterdir())) == 2


# Processes. A child writes prefixes until it is killed: pages of which neighbours share one, then the
# entry. It prints the number of each that is complete.
CHILD = """
import importlib.util, sys
import numpy as np
def load(path):
  spec = importlib.util.spec_from_file_location("it", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
store, records = map(load, sys.argv[1:3])
files = store.FileStore(sys.argv[3], max_bytes=int(sys.argv[4]))
first, last = map(int, sys.argv[5:7])
for number in range(first, last):
  pages = {}
  for n in (number, number + 1):
    data, digest = records.pack({}, {"kv": np.full(20_000, n)})
    pages[f"page-{digest}"] = data
  data, _ = records.pack({"pages": [*pages]}, {"tokens": np.array([number])})
  files.put(pages | {f"entry-{number:064x}": data})
  print(number, flush=True)
"""


def child(folder, first, last, max_bytes=10**9):
  argv = [store.__file__, records.__file__, folder, max_bytes, first, last]
  return subprocess.Popen(
    [sys.executable, "-c", CHILD, *map(str, argv)], stdout=subprocess.PIPE, text=True
  )


def complete(files):
  """The numbers of the entries; each is whole, and so are its pages."""
  numbers = set()
  for each in files.names():
    about, arrays, digest = records.unpack(files.get(each))
    if each.startswith("page-"):
      assert each == f"page-{digest}"
    else:
      pages = [records.unpack(files.get(page))[1]["kv"][0] for page in about["pages"]]
      number = int(arrays["tokens"][0])
      assert pages == [number, number + 1]
      numbers.add(number)
  return numbers


@pytest.mark.once
def test_a_killed_process_loses_at_most_what_it_was_writing(files):
  rng, done = np.random.default_rng(0), set()
  for turn in range(8):
    process = child(files.folder, 1000 * turn, 1000 * turn + 1000)
    printed = [process.stdout.readline()]  # it has begun
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    printed += process.communicate()[0].splitlines()
    done |= {int(line) for line in printed if line.strip()}
    found = complete(files)
    assert done <= found and len(found - done) <= turn + 1
  assert len(done) > 8


@pytest.mark.once
def test_processes_that_save_into_one_folder_leave_whole_prefixes(files):
  processes = [child(files.folder, 5 * n, 5 * n + 30) for n in range(3)]
  assert [process.wait() for process in processes] == [0] * 3
  for process in processes:
    process.stdout.close()
  assert complete(files) == set(range(40))


@pytest.mark.once
def test_processes_under_one_limit_keep_to_it(files):
  limit = 2_000_000
  processes = [child(files.folder, 100 * n, 100 * n + 20, limit) for n in range(2)]
  assert [process.communicate() and process.returncode for process in processes] == [0] * 2
  sizes = [file.stat().st_size for file in files.folder.iterdir()]
  assert sum(sizes) <= limit + 2 * 350_000  # each may not have seen what the other just wrote
  for each in files.names():
    records.unpack(files.get(each))
