import pytest
from command_line import assert_refused

from paged_jax.cli import serve


def test_a_server_on_few_pages_says_how_long_texts_may_be(capsys):
  assert serve._max_length(None, 64, 16, None) == 64
  assert serve._max_length(None, 64, 16, 4) == 64
  assert serve._max_length(32, 64, 16, 2) == 32
  assert capsys.readouterr().err == ""
  assert serve._max_length(None, 64, 16, 3) == 48
  line = "texts of 48 tokens at most: --num-pages 3 holds fewer than 64\n"
  assert capsys.readouterr().err == line


BAD = [
  (["serve", "--model", "nowhere"], "there is no model folder nowhere"),
  (["serve", "--model", "."], ". is no checkpoint: it has no config.json"),
  (["serve", "--port", "0", "--max-length", "65"], "--max-length is 65, but the model takes 64"),
  (
    ["serve", "--port", "0", "--max-length", "33", "--num-pages", "2"],
    "--max-length is 33, but --num-pages 2 holds 32 tokens",
  ),
  (
    ["serve", "--port", "0", "--attention", "cuda"],
    "implementation must be None or one of reference, xla, tpu, gpu, hopper, got 'cuda'",
  ),
  (
    ["serve", "--port", "0", "--attention", "tpu"],
    "implementation 'tpu' cannot serve this cache: head_dim must be a multiple of 64, not 8",
  ),
  (["serve", "--port", "65536"], "Invalid value for '--port'"),
  (["serve", "--port", "1", "--host", "192.0.2.1"], "[Errno 99] Cannot assign requested address"),
]


@pytest.mark.parametrize(("argv", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(
  paged_jax, folder, tmp_path, monkeypatch, argv, message
):
  monkeypatch.chdir(tmp_path)
  model = () if "--model" in argv else ("--model", folder)
  assert_refused(paged_jax(*argv, *model), message)
