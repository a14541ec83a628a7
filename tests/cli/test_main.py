import subprocess
import sys

import pytest
from command_line import assert_refused, process

from paged_jax import models


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["dance"], "No such command 'dance'"),
    ([], "Missing command"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(paged_jax, argv, message):
  assert_refused(paged_jax(*argv), message)


def test_an_interrupt_ends_without_traceback(paged_jax, monkeypatch):
  def interrupt():
    raise KeyboardInterrupt

  monkeypatch.setattr(models, "embedded", interrupt)
  code, _, err = paged_jax("demo")
  assert code == 130
  assert "Traceback" not in err


@pytest.mark.parametrize(
  ("command", "missing"),
  [
    *(("demo", package) for package in ("typer", "rich", "flax", "tokenizers", "filelock")),
    *(("serve", package) for package in ("starlette", "uvicorn", "prometheus_client")),
  ],
)
def test_a_missing_extra_is_named_with_its_cure(command, missing):
  code = (
    f"import sys; sys.modules[{missing!r}] = None; from paged_jax.cli import main; "
    f"main.main([{command!r}])"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert result.returncode == 2
  assert result.stderr == (
    f"error: {missing} is not installed; try: pip install 'paged_jax[{command}]'\n"
  )


def test_a_process_fails_with_code_2_and_no_traceback(folder):
  result = process("generate", "", "--model", folder)
  assert (result.returncode, result.stdout) == (2, "")
  assert result.stderr == "error: prompt 1 is empty\n"
