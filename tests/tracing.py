"""What a program does, read from its trace."""

import re

import jax


def shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def primitives(jaxpr):
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from primitives(inner)


def host_calls(fn, *args):
  """Names of primitives that talk to the host. Tracing from shapes cannot read any value."""
  found = set(primitives(jax.make_jaxpr(fn)(*shapes(args)).jaxpr))
  assert "while" in found, "the walk did not go in"
  return {name for name in found if re.search("callback|infeed|outfeed|device_put|debug", name)}
