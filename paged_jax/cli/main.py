"""The `paged-jax` command: an environment fit for it, and one line for any error, except that a kernel
that is wrong is shown with its table."""

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn, cast

from paged_jax import interrupts

_EXTRAS = {  # that bring a package
  **dict.fromkeys(
    ("typer", "rich", "flax", "safetensors", "tokenizers", "filelock", "platformdirs"), "demo"
  ),
  **dict.fromkeys(("starlette", "uvicorn", "prometheus_client"), "serve"),
}


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line; exits with 2 after bad input, and with 130 at an interrupt."""
  interrupts.end_at_once()
  _avoid_miscompilation()
  try:
    _run(argv)
  except ModuleNotFoundError as error:
    package = str(error.name).split(".")[0]
    if package not in _EXTRAS:
      raise
    _fail(f"{package} is not installed; try: pip install 'paged_jax[{_EXTRAS[package]}]'")


def _run(argv: Sequence[str] | None) -> NoReturn:
  import typer  # not earlier: these need the `demo` extra

  from paged_jax.cli import bench, demo, doctor, generate, programs, serve

  # The base class, which typer takes from its own click or from another, by version.
  usage_error = cast(type[typer.BadParameter], typer.BadParameter.__bases__[0])
  app = typer.Typer(add_completion=False, rich_markup_mode=None, help="A paged KV cache for JAX.")
  for name, module in {
    "demo": demo, "doctor": doctor, "generate": generate, "serve": serve, "bench": bench,
  }.items():  # fmt: skip
    app.command(name)(module.run)
  try:
    programs.keep()
    command = typer.main.get_command(app)
    sys.exit(command.main(argv, prog_name="paged-jax", standalone_mode=False) or 0)
  except usage_error as error:
    _fail(error.format_message())
  except NotImplementedError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
  except (ValueError, OSError) as error:
    _fail(str(error))
  except (KeyboardInterrupt, typer.Abort):
    interrupts.end()


def _fail(message: str) -> NoReturn:
  print("error:", " ".join(message.split()), file=sys.stderr)
  sys.exit(2)


def _avoid_miscompilation() -> None:
  """Sets a flag without which jaxlib 0.10 computes some reductions wrongly on CPU, silently.

  It is read when the first program is compiled.
  """
  if metadata.version("jaxlib").startswith("0.10."):
    flag = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


if __name__ == "__main__":
  main()
