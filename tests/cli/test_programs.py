import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from paged_jax.cli import programs

PROGRAM = """
import jax
from paged_jax.cli import programs
programs.MAX_BYTES = 20_000
programs.keep()
hits = []
jax.monitoring.register_event_listener(
  lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
)
for n in range(1, 9):
  jax.jit(lambda x: x + n)(1.0)
print(len(hits))
"""


@pytest.fixture
def settings(monkeypatch, tmp_path):
  """Of a jax that keeps no programs yet, and a cache folder for the user."""
  changed = {}
  settings = types.SimpleNamespace(
    jax_compilation_cache_dir=None, jax_enable_compilation_cache=True, changed=changed,
    update=changed.__setitem__,
  )  # fmt: skip
  monkeypatch.setattr(programs, "_settings", settings)
  monkeypatch.setattr(programs.platformdirs, "user_cache_path", lambda *_, **__: tmp_path / "ours")
  return settings


def test_programs_are_kept_in_the_users_cache_folder_all_of_them_and_not_without_end(
  settings, tmp_path
):
  programs.keep()
  assert settings.changed == {
    "jax_compilation_cache_dir": str(tmp_path / "ours"),
    "jax_compilation_cache_max_size": programs.MAX_BYTES,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  assert (tmp_path / "ours").is_dir()


@pytest.mark.parametrize(
  ("name", "value", "folder"),
  [
    ("jax_compilation_cache_dir", "theirs", "theirs"),
    ("jax_enable_compilation_cache", False, None),
  ],
)
def test_what_the_user_asks_of_jax_stays(settings, tmp_path, name, value, folder):
  setattr(settings, name, value)
  programs.keep()
  assert (settings.changed, programs.folder()) == ({}, folder)
  assert not (tmp_path / "ours").exists()


def test_a_folder_that_cannot_be_written_costs_one_line(settings, tmp_path, capsys):
  (tmp_path / "ours").write_text("a file")
  programs.keep()
  assert settings.changed == {}
  err = capsys.readouterr().err
  assert err.startswith("compiled programs are not kept: [Errno 17] File exists")
  assert err.count("\n") == 1


def test_an_unknown_home_makes_no_folder_in_this_one(settings, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(programs.platformdirs, "user_cache_path", lambda *_, **__: Path("~/.cache"))
  programs.keep()
  assert (settings.changed, os.listdir()) == ({}, [])
  assert capsys.readouterr().err == "compiled programs are not kept: ~/.cache is no absolute path\n"


def test_programs_that_were_not_written_to_their_end_go(settings, tmp_path):
  programs.keep()
  for name in ("half-cache", "whole-cache", "whole-atime"):
    (tmp_path / "ours" / name).write_bytes(b"12345678")
  programs.keep()
  left = {path.name for path in (tmp_path / "ours").iterdir()}
  assert left - {".lockfile"} == {"whole-cache", "whole-atime"}


def test_jax_keeps_them_within_bounds(tmp_path):
  env = {name: value for name, value in os.environ.items() if "CACHE" not in name}
  env["XDG_CACHE_HOME"] = str(tmp_path)

  def run():
    done = subprocess.run(
      [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True
    )
    sizes = [path.stat().st_size for path in (tmp_path / "paged_jax").glob("*-cache")]
    assert 10_000 < sum(sizes) <= 20_000
    assert done.stderr == ""
    return int(done.stdout)

  assert run() == 0
  assert run() > 0
