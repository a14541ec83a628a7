"""The public names: listed, versioned, documented, each with an example that others run."""

import importlib
import inspect
import re
from importlib import metadata

import pytest

import paged_jax
from paged_jax.host import Handle, Manager

MODULES = ["", ".host", ".models", ".testing", ".testing.invariants", ".sharding", ".viz"]


@pytest.mark.parametrize("name", MODULES)
def test_each_public_function_and_class_has_an_example(name):
  module = importlib.import_module(f"paged_jax{name}")
  names = [
    name for name, value in vars(module).items()
    if not name.startswith("_") and inspect.isfunction(value) and value.__module__ == module.__name__
  ]  # fmt: skip
  for public in getattr(module, "__all__", names):
    value = getattr(module, public)
    assert inspect.ismodule(value) or ">>> " in (value.__doc__ or ""), public


@pytest.mark.parametrize("kind", [Manager, Handle])
def test_each_public_method_has_an_example(kind):
  for name, method in inspect.getmembers(kind, inspect.isfunction):
    assert name.startswith("_") or ">>> " in (method.__doc__ or ""), name


def test_the_docstring_of_the_package_lists_each_verb_once_and_what_is_stable():
  lines = re.findall(r"^  ([a-z_]+(?:, [a-z_]+)*)  ", paged_jax.__doc__, re.MULTILINE)
  listed = [name for line in lines for name in line.split(", ")]
  verbs = [name for name in paged_jax.__all__ if inspect.isfunction(getattr(paged_jax, name))]
  assert sorted(listed) == sorted(verbs)
  for word in ("Stable: ", "Provisional: ", "Experimental: "):
    assert word in paged_jax.__doc__


def test_each_verb_is_compiled_too_except_check_plan():
  verbs = {name for name in paged_jax.__all__ if inspect.isfunction(getattr(paged_jax, name))}
  assert {name for name in verbs if not hasattr(paged_jax.jitted, name)} == {"check_plan"}


def test_the_installed_version_is_that_of_the_package():
  assert metadata.version("paged_jax") == paged_jax.__version__
