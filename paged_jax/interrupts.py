"""What Ctrl-C does to a command: it ends the process at once, whatever the process is in.

Python's own KeyboardInterrupt waits for compiled code to return, may be lost in a callback from it,
and then takes the interpreter apart while XLA's threads still compile, which can crash.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

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
  # The signal's number is written at once, by whatever thread it interrupts, with or without the
  # interpreter's lock; the handler itself has nothing left to do.
  signal.signal(signal.SIGINT, lambda number, frame: None)
  signal.set_wakeup_fd(writer.detach())
  threading.Thread(target=_watch, args=(reader,), name="interrupts", daemon=True).start()


@contextlib.contextmanager
def raised() -> Iterator[None]:
  """Inside, an interrupt is a KeyboardInterrupt in the main thread, as Python has it."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  descriptor = signal.set_wakeup_fd(-1)
  handler = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, handler)
    signal.set_wakeup_fd(descriptor)


def _watch(reader: socket.socket) -> None:
  while signal.SIGINT not in reader.recv(64):
    pass
  # Not flushed: another thread may hold a stream's lock, and what matters is written through.
  terminal = next(filter(os.isatty, (2, 1)), None)
  if terminal is not None:
    os.write(terminal, _SHOW_CURSOR)
  os._exit(CODE)
