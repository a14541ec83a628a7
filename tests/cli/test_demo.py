import pytest


@pytest.mark.once
def test_demo_prints_a_few_frames_and_a_summary(paged_jax):
  code, out, _ = paged_jax("demo")
  assert code == 0
  for event in ("prompts forked into samples", "shared pages copied", "finished rows freed"):
    assert event in out
  assert "96 of 96 pages are free again" in out
