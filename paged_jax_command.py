"""The `paged-jax` command, outside the package: whatever is in there imports jax first.

That takes a second, in which Python's own KeyboardInterrupt shows a traceback or crashes NumPy.
"""

import signal


def main() -> None:
  """Runs the command line; an interrupt ends the process at once."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  from paged_jax import cli

  cli.main()


if __name__ == "__main__":
  main()
