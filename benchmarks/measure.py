"""Fair timing on a shared machine: contenders take turns, medians are compared, one run prints all."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

if importlib.metadata.version("jaxlib").startswith("0.10."):
  # This version miscompiles some reductions on CPU, silently.
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_experimental_ynn_fusion_type=-reduce"

import jax


def arguments(description: str, **options) -> argparse.Namespace:
  """The command line: `--json`, `--rounds`, and `options` name=(type, default, help)."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
  parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
  for name, (kind, default, text) in options.items():
    parser.add_argument(f"--{name}", type=kind, default=default, help=text)
  return parser.parse_args()


def seconds(run: Callable[[], object]) -> float:
  """Wall time of one call, its result awaited."""
  begin = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - begin


def medians(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
  """Median seconds of each contender, after one warm-up, in turns a b c, a b c, ..."""
  for run in contenders.values():
    jax.block_until_ready(run())
  times = {name: [] for name in contenders}
  for _ in range(rounds):
    for name, run in contenders.items():
      times[name].append(seconds(run))
  return {name: statistics.median(each) for name, each in times.items()}


def last_level_cache() -> int:
  """Bytes of the largest CPU cache, 32 MiB where the system does not tell (as Linux does)."""
  found = pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
  return max((int(path.read_text().strip()[:-1]) * 2**10 for path in found), default=2**25)


def report(rows: list[dict], summary: dict, *, as_json: bool) -> None:
  """Prints a table, the summary, where it was measured and, if asked, all of it as one JSON line."""
  columns = list(dict.fromkeys(column for row in rows for column in row))
  cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
  widths = [max(map(len, column)) for column in zip(columns, *cells)]
  for line in [columns, *cells]:
    print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
  print()
  for name, value in summary.items():
    print(f"{name:>28}  {_text(value)}")
  where = {
    "jax": jax.__version__,
    "python": platform.python_version(),
    "device": jax.devices()[0].device_kind,
    "cores": os.cpu_count(),
  }
  print(f"\n{' '.join(f'{k}={v}' for k, v in where.items())}")
  if as_json:
    date = datetime.date.today().isoformat()
    print(json.dumps({**summary, "rows": rows, "where": where, "date": date}))
  sys.stdout.flush()


def _text(value) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)
