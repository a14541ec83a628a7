"""Ctrl-C: it ends a command at once, whatever the process is in, and no round of an engine is left half
done by it.

Python's own KeyboardInterrupt waits for compiled code to return, may be lost in a callback from it,
and then takes the interpreter apart while XLA's threads still compile, which can crash.
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
  """From here on an interrupt ends the process with exit code 130, without cleaning up.

  Nothing changes outside the main thread, or in a process that ignores interrupts or has a handler
  of its own.
  """
  main = threading.current_thread() is threading.main_thread()
  if not main or signal.getsignal(signal.SIGINT) not in _DEFAULTS:
    return
  reader, writer = socket.socketpair()
  writer.setblocking(False)
  # The handler runs between two bytecodes of the main thread. While that one is in compiled code,
  # the signal's number gets through: it is written without the interpreter's lock.
  signal.signal(signal.SIGINT, _handle)
  signal.set_wakeup_fd(writer.detach())
  threading.Thread(target=_watch, args=(reader,), name="interrupts", daemon=True).start()


def end() -> NoReturn:
  """Ends the process as an interrupt does.

  Streams are not flushed: another thread may hold a lock of theirs. Text is flushed when written.
  """
  terminal = next(filter(os.isatty, (2, 1)), None)
  if terminal is not None:
    os.write(terminal, _SHOW_CURSOR)
  os._exit(CODE)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
  """Raises Python's KeyboardInterrupt only after the block, unless a second one comes.

  Nothing changes outside the main thread, or where somebody else handles interrupts.
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
  """Ends the process after an interrupt, unless somebody else handles it now, as a server does."""
  while signal.SIGINT not in reader.recv(64) or signal.getsignal(signal.SIGINT) is not _handle:
    pass
  end()
