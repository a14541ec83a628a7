"""A sample changes state by five transitions, and nobody else writes its fields."""

import ast
import dataclasses
import pathlib

import pytest

import paged_jax.engine
from paged_jax.engine import Completion, Sampling
from paged_jax.engine.requests import NOTHING, Body, Change, Request, Sample, State

ROOT = pathlib.Path(paged_jax.engine.__file__).parent
FIELDS = {field.name for field in [*dataclasses.fields(Sample), *dataclasses.fields(Change)]}
STATE = {*Body._fields, "resting", "completion"}
TRANSITIONS = {"begin", "compute", "leave", "become", "end"}


def writes(tree):
  """Fields written in a tree: (object, field) each."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
      yield ast.unparse(node.value), node.attr
    elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Attribute):
      yield ast.unparse(node.target.value), node.target.attr
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
      yield ast.unparse(node.args[0]), "?"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.stem)
def test_only_requests_writes_fields_of_samples(path):
  if path.stem == "requests":
    return
  # `self` is an object of that file: samples have their methods in requests.py
  others = [each for each in writes(ast.parse(path.read_text())) if each[0] != "self"]
  assert not [each for each in others if each[1] in FIELDS - {"request", "number"} | {"?"}]


def test_only_transitions_write_the_state():
  tree = ast.parse((ROOT / "requests.py").read_text())
  (sample,) = [x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "Sample"]
  methods = [x for x in sample.body if isinstance(x, ast.FunctionDef)]
  writers = {x.name for x in methods if {field for _, field in writes(x)} & STATE}
  assert writers == TRANSITIONS


def sample(prompt=(1, 2, 3), **fields):
  request = Request(prompt)
  request.samples.append(Sample(0, 0, request, Sampling(**fields)))
  return request.samples[0]


def test_a_sample_goes_through_its_states():
  s = sample(max_new_tokens=4)
  assert s.state is State.WAITING and s.unread == 3 and not s.draws
  s.begin(Body(handle := object(), row=5, decoding=False, prefilled=1))
  assert s.state is State.READING and s.unread == 2
  assert not s.compute(1) and s.state is State.READING
  assert s.compute(1) and s.state is State.DRAWING and s.draws
  s.expect(4)
  assert not s.draws  # it may end in the call that is not read
  s.report(4)
  s.add([7], [-0.5])
  assert s.draws and s.text == [1, 2, 3, 7]
  assert s.leave(swapped=True) == Body(handle, 5, True, 3)
  assert s.state is State.SWAPPED and s.decoding
  s.begin(Body(handle, 2, True, 0))
  s.ask(resting=True)
  assert s.state is State.DRAWING  # until the next round
  s.become()
  assert s.state is State.RESTING and s.row == 2
  s.end(Completion([7], [-0.5], "cancelled", None))
  assert s.state is State.ENDED and s.handle is handle
  s.leave()
  assert s.state is State.ENDED and (s.handle, s.row, s.decoding, s.prefilled) == NOTHING


def test_a_command_says_what_a_sample_is_to_be_and_the_next_one_sees_it():
  s = sample()
  s.add([7, 8, 9], [0.0] * 3)
  s.ask(tokens=[7, 8], logprobs=[0.0] * 2)
  s.ask(reason="cancelled")
  assert s.tokens == [7, 8, 9]
  said = s.become()
  assert (s.tokens, said.reason, said.source, s.change) == ([7, 8], "cancelled", s, None)
  assert s.become() is None


def test_a_part_of_the_text_crosses_from_the_prompt_to_what_was_drawn():
  s = sample(prompt=(1, 2, 3))
  s.add([4, 5], [0.0] * 2)
  for start in range(6):
    for end in range(start, 6):
      assert s.part(start, end) == [1, 2, 3, 4, 5][start:end]


def test_a_listener_hears_of_each_token_once():
  s = sample()
  assert s.news() is None
  s.add([7, 8], [-1.0, -2.0])
  assert s.news() == ([7, 8], [-1.0, -2.0]) and s.news() is None
  s.end(Completion([7, 8], [-1.0, -2.0], "length", None))
  assert s.news() == ([], [])
