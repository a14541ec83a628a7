"""Ctrl-C: it ends a command at once, and never stops an engine in the middle of a round.

Python's own KeyboardInterrupt comes only after compiled code has returned, and a callback from such
code can lose it. It then shuts the interpreter down while XLA's threads compile, which can crash.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

CODE = 130  # what shells give a process that SIGINT ended: 128 + 2
_DEFAULTS = (signal.default_int_handler, signal.SIG_DFL)
_SHOW_CURSOR = b"\x1b[?25h\n"  # spinners and bars hide it


def end_at_once() -> None:
  """From here on an interrupt ends the process with exit code 130, without any cleaning up.

  Does nothing outside the main thread, or if the process ignores interrupts or has its own handler.
  """
  main = threading.current_thread() is threading.main_thread()
  if not main or signal.getsignal(signal.SIGINT) not in _DEFAULTS:
    return
  reader, writer = socket.socketpair()
  writer.setblocking(False)
  # The handler runs between two bytecodes of the main thread, so not while compiled code runs there.
  # The signal's number arrives in both cases: Python writes it without the interpreter's lock.
  signal.signal(signal.SIGINT, _handle)
  signal.set_wakeup_fd(writer.detach())
  threading.Thread(target=_watch, args=(reader,), name="interrupts", daemon=True).start()


def end() -> NoReturn:
  """Ends the process as an interrupt does.

  It does not flush streams: another thread may hold their locks. Commands flush what they write.
  """
  terminal = next(filter(os.isatty, (2, 1)), None)
  if terminal is not None:
    os.write(terminal, _SHOW_CURSOR)
  os._exit(CODE)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
  """Raises Python's KeyboardInterrupt only after the block, unless a second one comes.

  Does nothing outside the main thread, or if the process has its own handler.
  """
  main = threading.current_thread() is threading.main_thread()
  if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    yield
    return
  came: list[int] = []

  def hold(number: int, frame: FrameType | None) -> None:
    if came:
      signal.default_int_handler(number, frame)
    came.append(number)

  signal.signal(signal.SIGINT, hold)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
      raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
  del number, frame
  end()


def _watch(reader: socket.socket) -> None:
  """Ends the process after an interrupt, unless a handler was set since, as a server does."""
  while signal.SIGINT not in reader.recv(64) or signal.getsignal(signal.SIGINT) is not _handle:
    pass
  end()
