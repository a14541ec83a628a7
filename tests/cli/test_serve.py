import json
import signal
import subprocess
import sys
import urllib.request

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


def ask(process, prompt):
  """The server's answer, once it says where it is."""
  url = process.stdout.readline().split(" is at ")[1].strip()
  body = json.dumps(
    {"model": "model", "prompt": prompt, "max_tokens": 8, "temperature": 0}
  ).encode()
  asked = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
  with urllib.request.urlopen(asked, timeout=60) as answer:
    return json.load(answer)["choices"][0]["text"]


@pytest.mark.once
@pytest.mark.timeout(180)  # it compiles the programs of an engine
def test_prefixes_are_saved_at_the_end_and_loaded_at_the_start(folder, tmp_path):
  prefixes = tmp_path / "prefixes"
  argv = ["serve", "--model", folder, "--name", "model", "--port", 0, "--prefixes", prefixes]
  argv += ["--num-rows", 2, "--prompt-size", 32]
  texts = []
  for turn, (number, code) in enumerate([(signal.SIGTERM, 143), (signal.SIGINT, 130)]):
    pipes = dict(
      stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    command = [sys.executable, "-m", "paged_jax", *map(str, argv)]
    with subprocess.Popen(command, **pipes) as process:
      try:
        texts.append(ask(process, "the quick brown fox jumps over"))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
      finally:
        process.kill()
    assert process.returncode == code
    assert f"{2 * turn} prefixes loaded from {prefixes}\n" in err
    assert f"2 prefixes saved in {prefixes}\n" in err
  assert texts[0] == texts[1]
