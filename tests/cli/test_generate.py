import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from command_line import assert_refused, byte_tokenizer, process, without_progress

from paged_jax import models
from paged_jax.cli import generate, progress
from paged_jax.cli.generate import Writer
from paged_jax.cli.progress import Summary, Update
from paged_jax.engine import Engine

# Equal sizes, so that most runs share their compiled programs.

SIZES = ("--num-pages", 8, "--max-new-tokens", 20)


def test_generate_streams_text_and_sums_up(paged_jax, folder):
  code, out, err = paged_jax("generate", "To be", "--model", folder, *SIZES)
  assert code == 0
  assert out.endswith("\n") and len(out) > 1
  (first, last) = err.splitlines()
  assert first == "loading and compiling"
  assert last.startswith("20 tokens in ") and " 2 pages used at most, 2 without sharing" in last


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_keys_and_values_may_have_8_bits(paged_jax, folder, dtype, monkeypatch):
  made = []
  monkeypatch.setattr(
    generate, "Engine", lambda *args, **kw: made.append(Engine(*args, **kw)) or made[0]
  )
  code, out, _ = paged_jax("generate", "To be", "--model", folder, *SIZES, "--kv-dtype", dtype)
  assert code == 0 and len(out) > 1
  assert made[0].manager.cache.pages.dtype == dtype


def test_stop_text_ends_a_sample_and_is_not_shown(paged_jax, folder, tmp_path):
  options = ("--model", folder, *SIZES, "--output-ids", tmp_path / "ids.json")
  _, whole, _ = paged_jax("generate", "To be", *options)
  stop = whole[6:8]
  code, out, _ = paged_jax("generate", "To be", *options, "--stop", stop, "--stop", "absent")
  tokens = json.loads((tmp_path / "ids.json").read_text())[0]
  assert code == 0
  assert out == whole[: whole.index(stop)] + "\n"
  assert len(tokens) < 20


@pytest.mark.once
def test_prompts_come_from_arguments_a_file_or_standard_input(paged_jax, folder, tmp_path):
  lines = tmp_path / "prompts.txt"
  content = "\ufeffone\r\na\x0cpage\u2028break\n"
  lines.write_bytes(content.encode())
  options = ("--model", folder, *SIZES)
  outputs = [
    paged_jax("generate", "one", "a\x0cpage\u2028break", *options)[:2],
    paged_jax("generate", "--prompts", lines, *options)[:2],
    paged_jax("generate", *options, stdin=content)[:2],
  ]
  assert outputs[0][0] == 0
  assert "[prompt 1]\n" in outputs[0][1] and "[prompt 2]\n" in outputs[0][1]
  assert outputs == [outputs[0]] * 3


def test_few_pages_leave_room_for_few_tokens(paged_jax, folder):
  options = ("--model", folder, "--num-pages", 2)
  code, _, err = paged_jax("generate", "abc", *options)
  _, room, summary = err.splitlines()
  assert code == 0
  assert room.endswith(": after prompt 1 of length 3, --num-pages 2 has room for 30")
  assert summary.startswith("30 tokens in")
  code, _, err = paged_jax("generate", "abc", *options, "--max-new-tokens", 30)
  assert code == 0
  assert without_progress(err).startswith("30 tokens in")


def test_the_tokenizers_own_tokens_can_be_left_out(paged_jax, folder, tmp_path):
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  tokenizer = byte_tokenizer()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="Z $A", special_tokens=[("Z", tokenizer.token_to_id("Z"))]
  )
  tokenizer.save(str(tmp_path / "tokenizer.json"))

  def num_tokens(text, *options):  # of a prompt; 33 of them leave no room
    argv = ("generate", text, "--model", tmp_path, "--num-pages", 2, *options)
    return 33 - int(without_progress(paged_jax(*argv)[2]).split()[0])

  assert num_tokens("To be") == 6
  assert num_tokens("To be", "--no-special-tokens") == 5
  assert num_tokens("ZTo be") == 7  # as transformers has it
  assert num_tokens("ZTo be", "--no-special-tokens") == 6


def test_equal_seeds_give_equal_texts(paged_jax, folder):
  options = ("--model", folder, *SIZES, "--temperature", 1, "--top-k", 50, "--top-p", 0.95)
  both = paged_jax("generate", "hi", *options, "--seed", 3, "--num-samples", 2)
  second = paged_jax("generate", "hi", *options, "--seed", 4)
  assert both[1].split("[prompt 1, sample 2]\n")[1] == second[1]


def test_ids_go_in_and_out_without_a_tokenizer(paged_jax, folder, tmp_path):
  bare, given, new = tmp_path / "bare", tmp_path / "given.json", tmp_path / "new.json"
  bare.mkdir()
  for name in ("config.json", "model.safetensors"):
    (bare / name).write_bytes((folder / name).read_bytes())
  given.write_text("[[1, 2, 3], [4]]")
  options = ("--model", bare, *SIZES, "--output-ids", new, "--prompt-ids", given)
  code, out, _ = paged_jax("generate", *options)
  ids = json.loads(new.read_text())
  assert code == 0
  assert [len(tokens) for tokens in ids] == [20, 20]
  assert "[prompt 2]\n" + " ".join(map(str, ids[1])) in out


@pytest.mark.once
def test_a_long_prompt_gets_the_room_that_is_left_in_the_dtype_asked_for(paged_jax, folder):
  code, _, err = paged_jax("generate", "a" * 60, "--model", folder, "--dtype", "bfloat16")
  assert code == 0
  _, room, summary = err.splitlines()
  assert room == (
    "fewer than 128 new tokens: after prompt 1 of length 60, the model has room for 4"
  )
  assert summary.startswith("4 tokens in")


BAD = [
  (["generate", "a", "--model", "nowhere"], "there is no model folder nowhere"),
  (["generate", "x" * 64], "prompt 1 has 64 tokens, but the model takes 64, new ones included"),
  (["generate", "", "--kv-dtype", "int8"], "prompt 1 is empty"),
  (
    ["generate", "a", "--kv-dtype", "int8", "--kv-dtype", "float32"],
    "--kv-dtype takes one, or one for each of 1 groups, got int8 float32",
  ),
  (["generate", "a", ""], "prompt 2 is empty"),
  (["generate"], "standard input has no prompt"),
  (["generate", "--prompts", "absent.txt"], "[Errno 2] No such file or directory: 'absent.txt'"),
  (["generate", "--prompts", "."], "[Errno 21] Is a directory: '.'"),
  (["generate", "--prompts", "latin.txt"], "latin.txt is not UTF-8 text"),
  (["generate", "a", "--prompts", "latin.txt"], "give prompts as arguments or in a file, not both"),
  (["generate", "a", "--prompt-ids", "x.json"], "give prompts as text or as tokens, not both"),
  (["generate", "--prompt-ids", "broken.json"], "broken.json is not JSON: "),
  (["generate", "--prompt-ids", "flat.json"], "flat.json must hold a list of lists"),
  (["generate", "--prompt-ids", "text.json"], "text.json must hold whole numbers, got 'a'"),
  (["generate", "--prompt-ids", "none.json"], "none.json has no prompt"),
  (["generate", "--prompt-ids", "empty.json"], "prompt 2 is empty"),
  (
    ["generate", "--prompt-ids", "large.json", "--max-new-tokens", "20"],
    "request 1: prompt has token 256, but the vocabulary has",
  ),
  (
    ["generate", "--prompt-ids", "negative.json", "--max-new-tokens", "20"],
    "request 2: prompt has token -1, but the vocabulary has",
  ),
  (["generate", "a", "--model", "."], ". is no checkpoint: it has no config.json"),
  (["generate", "a", "--output-ids", "no/file.json"], "[Errno 2] No such file or directory"),
  (
    ["generate", "a", "abc", "--max-new-tokens", "62"],
    "--max-new-tokens is 62, but after prompt 2 of length 3, the model has room for 61",
  ),
  (
    ["generate", "a", "--num-pages", "2", "--max-new-tokens", "33"],
    "--max-new-tokens is 33, but after prompt 1 of length 1, --num-pages 2 has room for 32",
  ),
  (
    ["generate", "x" * 33, "--num-pages", "2"],
    "prompt 1 has 33 tokens, but --num-pages 2 takes 33, new ones included",
  ),
  (["generate", "a", "--num-pages", "0"], "Invalid value for '--num-pages'"),
  (["generate", "a", "--page-size", "0"], "Invalid value for '--page-size'"),
  (["generate", "a", "--temperature", "-1"], "temperature is out of range: -1.0"),
  (["generate", "a", "--temperature", "warm"], "Invalid value for '--temperature'"),
  (["generate", "a", "--top-p", "0"], "top_p is out of range: 0.0"),
  (["generate", "a", "--top-k", "0"], "top_k is out of range: 0"),
  (["generate", "a", "--num-samples", "0"], "num_samples is out of range: 0"),
  (["generate", "a", "--max-new-tokens", "0"], "max_new_tokens is out of range: 0"),
  (["generate", "a", "--seed", "-1"], "seed is out of range: -1"),
  (["generate", "a", "--stop", ""], "--stop needs a text"),
  (["generate", "a", "--dtype", "int4"], "Invalid value for '--dtype'"),
  (["generate", "a", "--colour"], "No such option"),
]
FILES = {
  "broken.json": "[[1, 2", "flat.json": "[1, 2]", "text.json": '[["a"]]', "none.json": "[]",
  "empty.json": "[[1], []]", "large.json": "[[256]]", "negative.json": "[[1], [3, -1]]",
}  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(
  paged_jax, folder, tmp_path, monkeypatch, argv, message
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
  for name, content in FILES.items():
    (tmp_path / name).write_text(content)
  model = () if "--model" in argv else ("--model", folder)
  assert_refused(paged_jax(*argv, *model), message)


def test_a_damaged_checkpoint_is_one_line_and_exit_code_2(paged_jax, folder, tmp_path):
  for name in ("config.json", "tokenizer.json", "model.safetensors"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  tensors = tmp_path / "model.safetensors"
  tensors.write_bytes(tensors.read_bytes()[:2000])
  code, _, err = paged_jax("generate", "a", "--model", tmp_path)
  err = without_progress(err)
  assert code == 2 and err.count("\n") == 1
  assert err.startswith(f"error: {tensors} is not a readable safetensors file")

  (tmp_path / "tokenizer.json").unlink()
  code, _, err = paged_jax("generate", "a", "--model", tmp_path)
  assert (code, err.count("\n")) == (2, 1)
  assert "no tokenizer.json; give tokens with --prompt-ids" in err


def test_a_process_gives_the_tokens_of_transformers(compiled_as_users_do, tmp_path):
  golden = Path(__file__).parents[1] / "models" / "goldens" / "llama3"
  tokens = np.load(golden / "golden.npz")["tokens"].tolist()
  prompt, expected = tokens[:24], tokens[24:]
  (tmp_path / "in.json").write_text(json.dumps([prompt]))
  (end,) = models.eos_tokens(golden)
  result = process(
    "generate", "--model", golden, "--prompt-ids", tmp_path / "in.json",
    "--output-ids", tmp_path / "out.json", "--max-new-tokens", len(expected),
  )  # fmt: skip
  if end in expected:
    expected = expected[: expected.index(end) + 1]
  assert result.returncode == 0
  assert json.loads((tmp_path / "out.json").read_text()) == [expected]
  assert result.stdout == " ".join(map(str, expected)) + "\n"
  summary = without_progress(result.stderr)
  assert summary.count("\n") == 1 and summary.startswith(f"{len(expected)} tokens in")


def test_the_first_unfinished_sample_is_written_as_it_grows():
  writer = Writer(["[1]\n", "[2]\n", "[3]\n"])

  def add(texts, done):
    return writer.add(Update([], [*map(list, texts)], [*map(bool, done)], [], None, Summary()))

  assert add(["", "", ""], [0, 0, 0]) == "[1]\n"
  assert add(["a", "b", "c"], [0, 0, 1]) == "a"
  assert add(["ad", "be", "c"], [1, 0, 1]) == "d\n[2]\nbe"
  assert add(["ad", "bef", "c"], [1, 1, 1]) == "f\n[3]\nc\n"


def test_nothing_is_compiled_while_the_clock_runs(paged_jax, folder, compiled, monkeypatch):
  follow, during = progress.follow, []

  def watched(*args):
    updates = follow(*args)
    yield next(updates)
    before = len(compiled)
    yield from updates
    during.append(len(compiled) - before)

  monkeypatch.setattr(progress, "follow", watched)
  jax.clear_caches()  # so this is the last test here: the others share their programs
  options = ("--model", folder, *SIZES, "--num-samples", 2, "--temperature", 1)
  code, *_ = paged_jax("generate", "To be", *options)
  assert (code, during) == (0, [0])
  assert compiled
