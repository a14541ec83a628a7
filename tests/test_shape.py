"""The tail of the package may shrink, not grow: the longest file, function and parameter list, ...

A limit that fails is a question: can the code be shorter? Where it shrank, lower the limit.
"""

import ast
import io
import pathlib
import re
import tokenize

import pytest

import paged_jax

ROOT = pathlib.Path(paged_jax.__file__).parent
LIMITS = {  # largest values: of the package, and of the kernels
  "lines of a file": (1000, 335),
  "lines of a function": (72, 145),
  "parameters of a function": (17, 23),
  "nested blocks of a function": (4, 2),
  "public methods of a class": (52, 4),
}
COMMENTS = 7.4  # comments, and lines of pictures in docstrings, per 100 lines of code, at least
EMPTY = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
PICTURE = re.compile(r"^ +# ", re.MULTILINE)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
TEXTS = {path.relative_to(ROOT): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def is_kernel(path):
  return path.parts[0] == "attention" and path.stem not in ("cases", "proof")


def depth(node):
  """How deep blocks are nested in a node; an `elif` is as deep as its `if`."""
  deepest = 0
  for child in ast.iter_child_nodes(node):
    if not isinstance(child, (*FUNCTIONS, ast.ClassDef)):
      chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
      deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not chained))
  return deepest


def parameters(function):
  every = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
  return sum(each.arg not in ("self", "cls") for each in every)


def measures(text):
  """Pairs of a limit's name and (value, where)."""
  yield "lines of a file", (text.count("\n"), "")
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, FUNCTIONS):
      yield "lines of a function", (node.end_lineno - node.lineno + 1, node.name)
      yield "parameters of a function", (parameters(node), node.name)
      yield "nested blocks of a function", (depth(node), node.name)
    elif isinstance(node, ast.ClassDef):
      methods = [each.name for each in node.body if isinstance(each, FUNCTIONS)]
      public = sum(not name.startswith("_") for name in methods)
      yield "public methods of a class", (public, node.name)


VALUES = {path: list(measures(text)) for path, text in TEXTS.items()}


@pytest.mark.parametrize("kernels", [False, True], ids=["package", "kernels"])
@pytest.mark.parametrize("what", LIMITS)
def test_the_tail_does_not_grow(what, kernels):
  found = [
    (value, str(path), name)
    for path, values in VALUES.items()
    if is_kernel(path) == kernels
    for measure, (value, name) in values
    if measure == what
  ]
  assert max(found)[0] <= LIMITS[what][kernels], sorted(found)[-3:]


def test_comments_do_not_become_fewer():
  num_lines = comments = 0
  for text in TEXTS.values():
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
      if token.type == tokenize.COMMENT:
        comments += 1
      elif token.type == tokenize.STRING and token.string.startswith('"""'):
        comments += len(PICTURE.findall(token.string))
      elif token.type not in EMPTY:
        lines.update(range(token.start[0], token.end[0] + 1))
    num_lines += len(lines)
  assert 100 * comments / num_lines >= COMMENTS


def test_depth_counts_blocks_once():
  text = """
def f():
  if a:
    pass
  elif b:
    for c in d:
      pass
  else:
    with e:
      pass
"""
  assert depth(ast.parse(text).body[0]) == 2
