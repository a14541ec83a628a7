"""Tokenizers as released: what stands beside `tokenizer.json`, and what stays switched on in it."""

import json

import pytest
import tokenizers

from paged_jax import models

VOCAB = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c", "d"])}
TEXTS = ("a<|x|>b<|y|> c", "<|x|><|y|><|z|><s> <unk> d", " <|x|> ", "</s><|image|>")


def added(content, **flags):
  names = ("lstrip", "rstrip", "single_word", "normalized")
  return dict.fromkeys(names, False) | {"content": content, "special": True} | flags


def typed(content, **flags):
  return {"__type": "AddedToken"} | added(content, **flags)


CASES = {  # tokenizer_config.json, added_tokens.json, special_tokens_map.json
  "nothing": ({}, None, None),
  "decoder": ({"added_tokens_decoder": {"7": added("<|x|>"), "8": added("<|y|>")}}, None, None),
  "decoder, not special": (
    {"added_tokens_decoder": {"7": added("<|x|>", special=False, normalized=True)}}, None, None,
  ),
  "decoder, which strips": (
    {"added_tokens_decoder": {"7": added("<|x|>", lstrip=True, rstrip=True)}}, None, None,
  ),
  "decoder by text": (
    {"added_tokens_decoder": {str(i): added(f"<{i}>") for i in (10, 7, 9, 8)}}, None, None,
  ),
  "decoder of old tokens": (
    {"added_tokens_decoder": {"1": added("<s>"), "3": added("a"), "7": added("<|x|>")}}, None, None,
  ),
  "empty decoder hides the other files": (
    {"added_tokens_decoder": {}}, {"<|x|>": 7}, {"eos_token": "<|y|>"},
  ),
  "no text, unknown flag": (
    {"added_tokens_decoder": {"7": added("<|x|>", new=1), "9": {"special": True}}}, None, None,
  ),
  "added": ({}, {"<|x|>": 7, "<|y|>": 8}, None),
  "added, unsorted": ({}, {"<|x|>": 8, "<|y|>": 7}, None),
  "added, no config": (None, {"<|x|>": 7, "<|y|>": 8}, None),
  "added, one of them eos": ({"eos_token": "<|x|>"}, {"<|x|>": 7, "<|y|>": 8}, None),
  "special": ({}, None, {"eos_token": "<|x|>", "pad_token": added("<|y|>", lstrip=True)}),
  "special, no config": (None, None, {"eos_token": "<|x|>", "bos_token": "<s>"}),
  "special, further": ({}, None, {"additional_special_tokens": ["<|x|>", "<|y|>"]}),
  "special, own role": ({"eos_token": "<|z|>"}, None, {"image_token": "<|image|>"}),
  "roles": ({"eos_token": "<|x|>", "pad_token": None, "bos_token": typed("<|y|>")}, None, None),
  "own roles": ({"image_token": "<|image|>", "add_bos_token": True}, None, None),
  "further, older": ({"additional_special_tokens": ["<|x|>", typed("<|y|>")]}, None, None),
  "further": (
    {"additional_special_tokens": ["<|x|>"], "extra_special_tokens": ["<|y|>"]}, None, None,
  ),
  "further, named": ({"extra_special_tokens": {"image": "<|image|>"}}, None, None),
  "not looked for in texts": (
    {"split_special_tokens": True, "added_tokens_decoder": {"7": added("<|x|>")}}, None, None,
  ),
  "all at once": (
    {"pad_token": "<|y|>", "image_token": "<|image|>", "extra_special_tokens": ["<|z|>"]}
    | {"added_tokens_decoder": {"7": added("<|x|>", special=False)}, "eos_token": "<|x|>"},
    None, None,
  ),
}  # fmt: skip
IDS = {  # of the first text, by transformers 5.24
  "decoder": [3, 7, 4, 8, 0, 5],
  "added, no config": [3, 7, 4, 8, 0, 5],
  "special": [3, 7, 4, 8, 0, 5],
  "further": [3, 0, 0, 0, 0, 0, 4, 7, 0, 5],
}


def write(folder, config=None, added=None, special=None, change=lambda tokenizer: None):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=VOCAB, merges=[], unk_token="<unk>"))
  change(tokenizer)
  tokenizer.save(str(folder / "tokenizer.json"))
  contents = {
    "tokenizer_config.json": config and {"tokenizer_class": "PreTrainedTokenizerFast"} | config,
    "added_tokens.json": added,
    "special_tokens_map.json": special,
  }
  for name, content in contents.items():
    if content is not None:
      (folder / name).write_text(json.dumps(content))


def judged(folder):
  """The ids that transformers gives to our texts."""
  transformers = pytest.importorskip("transformers", reason="the live comparison needs it")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  return [tokenizer(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("name", IDS)
def test_tokens_of_other_files_have_their_ids(name, tmp_path):
  write(tmp_path, *CASES[name])
  assert models.tokenizer(tmp_path).encode(TEXTS[0]).ids == IDS[name]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("default")  # of transformers
def test_texts_have_the_ids_that_transformers_gives(name, tmp_path):
  write(tmp_path, *CASES[name])
  want = judged(tmp_path)  # first: it may skip the test
  tokenizer = models.tokenizer(tmp_path)
  assert [tokenizer.encode(text).ids for text in TEXTS] == want


def keep_x(tokenizer):
  tokenizer.add_special_tokens(["<|x|>"])


def cut(tokenizer):
  tokenizer.enable_truncation(2)


def pad(tokenizer):
  tokenizer.enable_padding(length=9, pad_id=0, pad_token="<unk>")


@pytest.mark.parametrize("change", [keep_x, cut, pad])
@pytest.mark.parametrize("name", ["nothing", "decoder", "added", "special", "further"])
@pytest.mark.filterwarnings("default")  # of transformers
def test_what_the_file_itself_says_is_decided_as_transformers_does(change, name, tmp_path):
  write(tmp_path, *CASES[name], change)
  want = judged(tmp_path)
  tokenizer = models.tokenizer(tmp_path)
  assert [tokenizer.encode(text).ids for text in TEXTS] == want


@pytest.mark.parametrize("change", [cut, pad])
def test_prompt_is_neither_cut_nor_padded(change, tmp_path):
  write(tmp_path, change=change)
  assert models.tokenizer(tmp_path).encode("abcabc").ids == [3, 4, 5, 3, 4, 5]


@pytest.mark.parametrize(
  ("config", "others", "message"),
  [
    ({"added_tokens_decoder": {"9": added("<|x|>")}}, {}, r"'<\|x\|>' must have the id 9, but gets"),
    ({"added_tokens_decoder": {"3": added("<|x|>")}}, {}, r"must have the id 3, but gets 7"),
    ({"added_tokens_decoder": {"9": added("a")}}, {}, "'a' must have the id 9, but gets 3"),
    ({"added_tokens_decoder": None}, {}, "added_tokens_decoder must be an object, got None"),
    ({"added_tokens_decoder": [1]}, {}, r"added_tokens_decoder must be an object, got \[1\]"),
    ({"added_tokens_decoder": {"x": added("<|x|>")}}, {}, "must be objects by their ids"),
    ({"added_tokens_decoder": {"7": "<|x|>"}}, {}, "must be objects by their ids"),
    ({"added_tokens_decoder": {"7": added(5)}}, {}, "content must be a string, got 5"),
    ({"added_tokens_decoder": {"7": added("x", lstrip="no")}}, {}, "lstrip must be true or false"),
    ({"eos_token": 5}, {}, "eos_token must be a string, got 5"),
    ({"extra_special_tokens": "<|x|>"}, {}, "extra_special_tokens must be a list of tokens"),
    ({"additional_special_tokens": [5]}, {}, "additional_special_tokens must be a string, got 5"),
    ({}, {"added_tokens.json": '{"<|x|>": "7"}'}, r"added_tokens\.json: '<\|x\|>' must be an id"),
    ({}, {"added_tokens.json": '{"<|x|>": 9}'}, r"added_tokens\.json: .* must have the id 9"),
    ({}, {"added_tokens.json": "[]"}, r"added_tokens\.json must hold a JSON object, got list"),
    ({}, {"special_tokens_map.json": "{"}, r"special_tokens_map\.json is not valid JSON"),
    ({}, {"special_tokens_map.json": '{"eos_token": 5}'}, r"special_tokens_map\.json: eos_token"),
    ({}, {"tokenizer_config.json": "5"}, r"tokenizer_config\.json must hold a JSON object"),
  ],
)  # fmt: skip
def test_damaged_file_is_named(config, others, message, tmp_path):
  write(tmp_path, config)
  for name, content in others.items():
    (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message) as raised:
    models.tokenizer(tmp_path)
  assert str(raised.value).startswith(str(tmp_path)) and "\n" not in str(raised.value)
