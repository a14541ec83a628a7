import types

import jax
import pytest

from paged_jax.attention import cases, xla

SMALL = ("--num-kv-heads", 1, "--head-dim", 8, "--dtype", "float32")


@pytest.fixture
def few(monkeypatch):
  monkeypatch.setattr(cases, "ESSENTIAL", cases.ESSENTIAL[:1])


def test_doctor_shows_what_would_be_chosen(paged_jax):
  code, out, _ = paged_jax("doctor")
  assert code == 0
  for word in ("jax", "jaxlib", "platform: cpu", "attention: ", "bfloat16 pages: stored as "):
    assert word in out
  for line in (
    "  xla: can be asked for",
    "  tpu: compiles for tpu only",
    "  gpu: compiles for gpu",
  ):
    assert line in out
  assert f"compiled programs: kept in {jax.config.jax_compilation_cache_dir}\n" in out


def test_doctor_verifies_pages_of_8_bits(paged_jax, few):
  code, out, _ = paged_jax("doctor", "--verify", "--dtype", "int8", "--head-dim", 16)
  assert code == 0
  assert "int8 pages: stored as int8" in out and "all cases agree, in place" in out


def test_verify_shows_a_table_on_standard_output_and_progress_elsewhere(paged_jax, few):
  code, out, err = paged_jax("doctor", "--verify", *SMALL)
  assert code == 0, out
  assert "attention: xla, 4 query heads over 1; pages of 16 x 8, float32" in out
  assert out.endswith("all cases agree, in place\n")
  assert err == "".join(f"verifying {n}/4\n" for n in range(1, 5))


def test_verify_ends_with_code_1_if_a_case_disagrees(paged_jax, few, monkeypatch):
  def doubled(*args):
    out, lse = xla.attend(*args)
    return 2 * out, lse

  monkeypatch.setattr(xla, "BACKEND", xla.BACKEND._replace(attend=doubled))
  code, out, _ = paged_jax("doctor", "--verify", "--attention", "xla", *SMALL)
  assert code == 1
  assert "output differs by" in out and "WRONG: 3 of 3 cases disagree" in out


@pytest.mark.parametrize(("argv", "message"), [
  (("--attention", "cuda"), "implementation must be one of "),
  (("--attention", "tpu", *SMALL), "implementation 'tpu' cannot serve this cache: head_dim"),
  (("--verify", "--num-heads", 3, *SMALL, "--num-kv-heads", 2), "num_heads must be a multiple of 2"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(paged_jax, argv, message):
  code, _, err = paged_jax("doctor", *argv)
  assert code == 2
  assert err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize(("kind", "num_cores"), [("TPU v5p", 2), ("TPU v6 lite", 1)])
def test_doctor_says_which_cores_the_kernels_leave_idle(kind, num_cores, paged_jax, monkeypatch):
  device = types.SimpleNamespace(device_kind=kind, num_cores=num_cores)
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  monkeypatch.setattr(jax, "devices", lambda *_: [device])
  code, out, _ = paged_jax("doctor")
  assert code == 0 and "attention: tpu, for bfloat16 pages" in out
  assert ("cores: the kernels use 1 of 2 in each chip" in out) == (num_cores == 2)
