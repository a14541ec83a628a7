"""Runs the scripts of `benchmarks/`, in processes of their own, and reads what they find."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
needs_tpu_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not installed"
)


def run(script, *arguments):
  """The last line that it prints with --json."""
  command = [sys.executable, FOLDER / script, "--json", *map(str, arguments)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])
