"""Ctrl-C at many moments, in processes of their own."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

CODE, SECONDS = 130, 2.0
COMMANDS = {
  "serve": ("serve", "--port", "0"),
  "generate": ("generate", "To be", "--max-new-tokens", "500", "--num-samples", "8"),
}


@pytest.fixture
def start(tmp_path):
  """Starts a command that compiles all its programs, and keeps them where nobody looks again."""
  env = {key: value for key, value in os.environ.items() if "CACHE" not in key}
  env["XDG_CACHE_HOME"] = str(tmp_path)
  pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  def popen(name, **streams):
    command = [sys.executable, "-m", "paged_jax", *COMMANDS[name]]
    return subprocess.Popen(command, env=env, **(pipes | streams))

  return popen


def interrupt(process):
  """What is left to read of both streams; it must end soon."""
  process.send_signal(signal.SIGINT)
  try:
    return process.communicate(timeout=SECONDS)
  finally:
    process.kill()


@pytest.mark.parametrize(
  ("name", "line", "delay"),
  [
    ("serve", b"loading embedded\n", 0.0),
    ("serve", b"compiling 1/10\n", 0.0),
    ("serve", b"compiling 1/10\n", 1.0),
    ("serve", b"compiling 2/10\n", 0.3),
    ("generate", b"loading and compiling\n", 0.0),
    ("generate", b"loading and compiling\n", 1.0),
    ("generate", b"loading and compiling\n", 2.0),
  ],
)
def test_loading_and_compiling_end_at_once(start, name, line, delay):
  process = start(name)
  while (read := process.stderr.readline()) != line:
    assert read
  time.sleep(delay)
  _, err = interrupt(process)
  assert process.returncode == CODE
  assert b"Traceback" not in err and b"Segmentation" not in err


@pytest.mark.once
def test_text_that_was_written_stays(start):
  process = start("generate")
  written = process.stdout.read(40)
  out, err = interrupt(process)
  assert process.returncode == CODE
  assert written.startswith(b"[prompt 1, sample 1]\n") and b"[prompt 1, sample 8]" not in out
  assert b"Traceback" not in err


def test_the_terminal_gets_its_cursor_back(start):
  ours, theirs = pty.openpty()
  process = start("generate", stderr=theirs)
  os.close(theirs)
  shown = b""
  while b"\x1b[?25l" not in shown:
    shown += os.read(ours, 1000)
  interrupt(process)
  assert process.returncode == CODE
  while b"\x1b[?25h\r\n" not in shown:
    shown += os.read(ours, 1000)
  assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
  os.close(ours)


def test_an_ignored_interrupt_stays_ignored():
  code = """
import os, signal
from paged_jax import interrupts
signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupts.end_at_once()
os.kill(os.getpid(), signal.SIGINT)
"""
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_handler_of_another_library_is_left_alone():
  code = """
import signal, time
from paged_jax import interrupts
interrupts.end_at_once()
ours = signal.signal(signal.SIGINT, lambda *_: print("theirs", flush=True))
signal.raise_signal(signal.SIGINT)
time.sleep(0.5)
signal.signal(signal.SIGINT, ours)
signal.raise_signal(signal.SIGINT)
print("too late", flush=True)
"""
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
  assert (run.returncode, run.stdout, run.stderr) == (CODE, b"theirs\n", b"")
