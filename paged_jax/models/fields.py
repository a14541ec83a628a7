"""Fields of the JSON files of a checkpoint. Errors name the field and its value."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST = 2**31 - 1


def read(file: Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    FileNotFoundError: The file does not exist.
    ValueError: It holds no JSON object; the message names the file.
  """
  try:
    raw = json.loads(file.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file} is not valid JSON: {error}") from None
  if not isinstance(raw, dict):
    raise ValueError(f"{file} must hold a JSON object, got {type(raw).__name__}")
  return raw


def whole(raw: Mapping[str, Any], name: str, low: int = 1, high: int = LARGEST) -> int:
  """An integer in [low, high]."""
  value = raw.get(name)
  if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
    large = type(value) is int and value > high
    below = "a positive integer" if low == 1 else f"an integer from {low} on"
    raise wrong(name, f"at most {high}" if large else below, value)
  return value


def number(raw: Mapping[str, Any], name: str, above: float = 0.0) -> float:
  """A finite number above a bound."""
  value = raw.get(name)
  if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < 1e38:
    raise wrong(name, f"a number above {above:g}", value)
  return float(value)


def flag(raw: Mapping[str, Any], name: str) -> bool:
  """True or false."""
  value = raw.get(name)
  if not isinstance(value, bool):
    raise wrong(name, "true or false", value)
  return value


def mapping(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
  """An object; empty if the field is missing or null."""
  value = raw.get(name)
  if value is None:
    return {}
  if not isinstance(value, dict):
    raise wrong(name, "an object", value)
  return value


def text(raw: Mapping[str, Any], name: str) -> str:
  """A string."""
  value = raw.get(name)
  if not isinstance(value, str):
    raise wrong(name, "a string", value)
  return value


def numbers(raw: Mapping[str, Any], name: str, count: int, unit: str) -> tuple[float, ...]:
  """A list of `count` positive numbers, one per `unit`."""
  value = raw.get(name)
  if not isinstance(value, list) or len(value) != count:
    raise wrong(name, f"a list of {count} numbers, one per {unit}", value)
  return tuple(number({name: entry}, name) for entry in value)


def wrong(name: str, wanted: str, value: Any) -> ValueError:
  """The error for a wrong field."""
  shown = repr(value)
  shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
  return ValueError(f"{name} must be {wanted}, got {shown}")
