import jax


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
