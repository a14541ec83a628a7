"""Request lengths as published traces have them: read from a file, or drawn from their quantiles."""

import csv
import json
import pathlib
from typing import NamedTuple

import numpy as np

# Azure LLM inference trace 2023, conversation (Splitwise, ISCA'24; Azure/AzurePublicDataset,
# CC-BY 4.0): every twentieth of the distribution of prompt and of generated tokens.
AZURE_PROMPT = (
  2,
  181,
  207,
  372,
  387,
  396,
  403,
  414,
  703,
  984,
  1020,
  1045,
  1071,
  1097,
  1130,
  1189,
  1315,
  1876,
  2734,
  4083,
  14050,
)
AZURE_OUTPUT = (
  7,
  41,
  54,
  67,
  77,
  85,
  91,
  96,
  103,
  113,
  129,
  151,
  177,
  217,
  384,
  395,
  400,
  411,
  424,
  451,
  1000,
)


def azure(path: pathlib.Path | None, count: int = 20_000) -> np.ndarray:
  """Prompt and output tokens [requests,2]: of the trace, or drawn from its quantiles."""
  if path is not None:
    with path.open() as file:
      lines = list(csv.DictReader(file))
    return np.array([[int(x["ContextTokens"]), int(x["GeneratedTokens"])] for x in lines])
  rng = np.random.default_rng(0)
  points = np.linspace(0, 1, len(AZURE_PROMPT))
  drawn = [np.interp(rng.random(count), points, x) for x in (AZURE_PROMPT, AZURE_OUTPUT)]
  return np.stack(drawn, axis=1).astype(int)


def mooncake(path: pathlib.Path) -> list[list[int]]:
  """Ids of each request's 512-token blocks; equal ids mean equal beginnings.

  From Mooncake's conversation trace (kvcache-ai/Mooncake, FAST'25, Apache-2.0).
  """
  return [json.loads(line)["hash_ids"] for line in path.read_text().splitlines()]


class Trace(NamedTuple):
  """Requests in order of arrival."""

  times: np.ndarray  # f64[requests] seconds from the first one on
  tokens: np.ndarray  # i64[requests,2] of prompt and output
  blocks: list[list[int]] | None  # ids of the prompts' 512-token blocks, None if unknown


def trace(path: pathlib.Path | None) -> Trace:
  """Azure's csv, Mooncake's jsonl, or an hour like Azure's: Poisson arrivals, drawn lengths."""
  if path is None:
    tokens = azure(None)
    gaps = np.random.default_rng(1).exponential(3600 / len(tokens), len(tokens))
    return Trace(np.cumsum(gaps), tokens, None)
  if path.suffix == ".csv":
    with path.open() as file:
      stamps = np.array([line["TIMESTAMP"] for line in csv.DictReader(file)], "datetime64[ns]")
    return Trace((stamps - stamps[0]) / np.timedelta64(1, "s"), azure(path), None)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  times = np.array([line["timestamp"] for line in lines]) / 1000
  tokens = np.array([[line["input_length"], line["output_length"]] for line in lines])
  return Trace(times, tokens, mooncake(path))


def like(
  mean_prompt: float, mean_output: float, spread: float, count: int, most: int
) -> np.ndarray:
  """Log-normal prompt and output tokens [requests,2] with these means and a spread of the logs."""
  rng = np.random.default_rng(0)
  means = np.array([mean_prompt, mean_output])
  drawn = rng.lognormal(np.log(means) - spread**2 / 2, spread, (count, 2))
  return np.clip(drawn.astype(int), 2, most)
