"""A small model, and the commands in this process."""

import io
import os
import sys

import pytest
from command_line import byte_tokenizer
from flax import nnx

from paged_jax import interrupts, models
from paged_jax.cli import main


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """A model with one token per byte, small enough to compile in seconds."""
  path = tmp_path_factory.mktemp("model")
  config = models.DecoderConfig(
    vocab_size=256, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=8, max_length=64, windows=(None,), ropes=(models.Rope(),), tied=True,
  )  # fmt: skip
  models.save(models.Decoder(config, rngs=nnx.Rngs(0)), path)
  byte_tokenizer().save(str(path / "tokenizer.json"))
  return path


@pytest.fixture
def paged_jax(monkeypatch, capsys):
  """Runs a command line; returns its exit code, standard output and standard error."""

  def run(*argv, stdin=""):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    with pytest.raises(SystemExit) as stopped:
      main.main([str(arg) for arg in argv])
    return stopped.value.code, *capsys.readouterr()

  monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
  monkeypatch.setattr(interrupts, "end_at_once", lambda: None)  # this process goes on
  monkeypatch.setattr(interrupts, "end", lambda: sys.exit(interrupts.CODE))
  return run
