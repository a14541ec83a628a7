"""What the tests of several commands need."""

import subprocess
import sys

import tokenizers


def byte_tokenizer():
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {letter: i for i, letter in enumerate(alphabet)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizer


def without_progress(err):
  """Standard error without the lines that say what is under way."""
  progress = ("loading ", "fewer than 128 new tokens: ")
  return "".join(line for line in err.splitlines(keepends=True) if not line.startswith(progress))


def assert_refused(result, message):
  """The command failed with one line, which begins with `message`, and with exit code 2."""
  code, out, err = result
  assert (code, out) == (2, "")
  assert without_progress(err).startswith(f"error: {message}")
  assert without_progress(err).count("\n") == 1 and err.endswith("\n")


def process(*argv):
  """A command line in a process of its own."""
  return subprocess.run(
    [sys.executable, "-m", "paged_jax", *map(str, argv)],
    capture_output=True, text=True, timeout=300,
  )  # fmt: skip
