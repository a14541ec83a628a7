"""How many cycles the TPU compiler expects a program to take, by its own estimates.

The compiler writes an estimate beside most operations of its optimized HLO. They are summed over the
program: a loop as often as it turns, a conditional with the branch that it takes. Without estimate:

- Our kernels. The caller says what they take.
- Copies between HBM and VMEM beside other operations, for instance of weights that are needed next.
  They count with their bytes at full bandwidth, although the operations beside them go on: a decode
  step is as long as its reads of HBM, whoever asks for them.
- Sorts, gathers, scatters and prefix sums. They count nothing; `unestimated` says how many ran.

Good for ranking programs and for finding what is slow, not for seconds: reading weights is estimated
at 86% of the bandwidth, and each operation at 2,100 cycles or more.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping

CLOCK = {"v6e": 1.755e9}  # cycles a second
BYTES_PER_CYCLE = {"v6e": 1.64e12 / CLOCK["v6e"]}  # of HBM
_UNESTIMATED = ("fusion", "sort", "reduce-window", "call-start")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


@dataclasses.dataclass
class Cycles:
  """What a program takes. `by_op` is the same by operation, all its turns together."""

  total: float = 0
  unestimated: int = 0
  by_op: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Op:
  name: str
  kind: str
  text: str
  functions: tuple[str, ...]  # Python functions that asked for it, innermost first

  def attribute(self, name: str) -> str | None:
    match = re.search(rf"\b{name}=%?([\w.\-]+|{{[^}}]*}})", self.text)
    return match and match[1]


def estimate(
  text: str,
  generation: str,
  kernels: Mapping[str, float],
  *,
  turns: Mapping[str, float],
  taken: Collection[str] = (),
  left: Collection[str] = (),
) -> Cycles:
  """The cycles of a program, given the `text` of its optimized HLO.

  Args:
    text: `compiled.as_text()`.
    generation: A key of `BYTES_PER_CYCLE`.
    kernels: Cycles of one call of each Pallas kernel, by its name.
    turns: How often the innermost loop with operations of a Python function turns, by the name of
      the function; of several that fit the first counts. (jax may give operations that two functions
      share to one of them.) Other loops turn to their limit if that is a constant, else once.
    taken: Python functions whose conditionals, also those of what they call, take the last branch;
      others take the first.
    left: Python functions whose own conditionals take the first branch all the same.
  """
  entry, computations = _parse(text)
  found = Cycles()

  def owns(body, function):
    inner = [op.attribute("body") for op in computations[body] if op.kind == "while"]
    return any(function in op.functions for op in computations[body]) and not any(
      owns(name, function) for name in inner
    )

  def times(loop):
    body, condition = loop.attribute("body"), computations[loop.attribute("condition")]
    named = [turns[function] for function in turns if owns(body, function)]
    limits = {op.name: re.search(r" constant\((\d+)\)", op.text) for op in condition}
    compared = re.search(r" compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT", condition[-1].text)
    limit = compared and limits.get(compared[1])
    return named[0] if named else int(limit[1]) if limit else 1

  def visit(computation, count):
    for op in computations[computation]:
      if op.kind == "while":
        visit(op.attribute("body"), count * times(op))
      elif op.kind == "conditional":
        branches = re.findall(r"%([\w.\-]+)", op.attribute("branch_computations"))
        chosen = set(taken) & set(op.functions) and op.functions[0] not in left
        visit(branches[-1 if chosen else 0], count)
      elif op.kind == "call":
        visit(op.attribute("to_apply"), count)
      else:
        cycles = _cycles(op, generation, kernels)
        found.unestimated += count if cycles is None and op.kind in _UNESTIMATED else 0
        found.by_op[op.name] = found.by_op.get(op.name, 0) + count * (cycles or 0)

  visit(entry, 1)
  found.total = sum(found.by_op.values())
  return found


def _cycles(op: _Op, generation: str, kernels: Mapping[str, float]) -> float | None:
  """Cycles of one operation, None if nobody knows."""
  if 'custom_call_target="tpu_custom_call"' in op.text:
    return kernels[re.sub(r"\.\d+$", "", op.name)]
  if op.kind in ("copy-start", "slice-start"):
    dtype, shape = re.search(r"(\w+)\[([\d,]*)\]", op.text).groups()
    size = _SIZES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
    return size / BYTES_PER_CYCLE[generation]
  match = re.search(r'"estimated_cycles":"(\d+)"', op.text)
  return None if match is None or int(match[1]) > 2**62 else int(match[1])


def _parse(text: str) -> tuple[str, dict[str, list[_Op]]]:
  """The entry, and the operations of each computation."""
  frames, computations, entry = _functions(text), {}, ""
  ops: list[_Op] = []
  for line in text.splitlines():
    if match := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
      ops = computations[match[2]] = []
      entry = match[2] if match[1] else entry
    elif match := re.match(r"  (?:ROOT )?%([\w.\-]+) = .*? ([a-z][a-z\-]*)\(", line):
      frame = re.search(r"stack_frame_id=(\d+)", line)
      ops.append(_Op(match[1], match[2], line, frames[int(frame[1])] if frame else ()))
  return entry, computations


def _functions(text: str) -> dict[int, tuple[str, ...]]:
  """The Python functions of each stack frame that the HLO names, innermost first."""
  names = dict(re.findall(r'^(\d+) "(.*)"$', text[text.index("FunctionNames") :], re.M))
  places = re.findall(r"^(\d+) \{file_name_id=\d+ function_name_id=(\d+)", text, re.M)
  places = {place: names[name] for place, name in places}
  frames = {0: ()}
  for frame, place, parent in re.findall(
    r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}", text, re.M
  ):  # parents come first, and are numbered from 1
    frames[int(frame)] = places[place], *frames[int(parent) - 1]
  return frames
