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


MISSING = [
  *(("demo", package) for package in ("typer", "rich", "flax", "tokenizers", "filelock")),
  *(("serve", package) for package in ("starlette", "uvicorn", "prometheus_client")),
]
WITHOUT = """
import sys

for command, missing in {}:
  for name in [name for name in sys.modules if name.split(".")[0] == "paged_jax"]:
    del sys.modules[name]
  known, sys.modules[missing] = sys.modules.pop(missing, None), None
  from paged_jax.cli import main
  try:
    main.main([command])
  except SystemExit as stopped:
    print(stopped.code)
  del sys.modules[missing]
  if known is not None:
    sys.modules[missing] = known
"""


def test_a_missing_extra_is_named_with_its_cure():
  code = WITHOUT.format(MISSING)
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert (result.returncode, result.stdout) == (0, "2\n" * len(MISSING))
  assert result.stderr.splitlines() == [
    f"error: {missing} is not installed; try: pip install 'paged_jax[{command}]'"
    for command, missing in MISSING
  ]


def test_a_process_fails_with_code_2_and_no_traceback(folder):
  result = process("generate", "", "--model", folder)
  assert (result.returncode, result.stdout) == (2, "")
  assert result.stderr == "error: prompt 1 is empty\n"
