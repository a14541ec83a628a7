import pytest
import tokenizers

from paged_jax.engine import prompts


@pytest.mark.parametrize(
  ("content", "expected"),
  [
    (b"", []),
    (b"\n", [""]),
    (b"one\ntwo", ["one", "two"]),
    (b"one\r\n\r\ntwo\r\n", ["one", "", "two"]),
    ("\ufeffone\n\ufefftwo\n".encode(), ["one", "\ufefftwo"]),
    (
      "a\rb\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029c\n".encode(),
      ["a\rb\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029c"],
    ),
  ],
)
def test_lines_end_with_a_newline_and_with_nothing_else(content, expected):
  assert prompts.lines(content) == expected


@pytest.fixture(scope="module")
def tokenizer():
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<bos>": 0, "a": 1}, unk_token="a"))
  words.add_special_tokens(["<bos>"])
  words.post_processor = tokenizers.processors.TemplateProcessing(
    single="<bos> $A", special_tokens=[("<bos>", 0)]
  )
  return words


def test_a_text_gets_the_tokenizers_own_tokens_unless_told_otherwise(tokenizer):
  assert prompts.encode(tokenizer, "a") == (0, 1)
  assert prompts.encode(tokenizer, "a", special_tokens=False) == (1,)


def test_a_bos_that_is_there_is_kept_as_transformers_keeps_it(tokenizer):
  assert prompts.encode(tokenizer, "<bos>a") == (0, 0, 1)
  assert prompts.encode(tokenizer, "<bos>a", special_tokens=False) == (0, 1)


def test_no_text_has_no_tokens(tokenizer):
  assert prompts.encode(tokenizer, "") == ()


def test_half_a_surrogate_pair_is_no_text(tokenizer):
  with pytest.raises(ValueError, match=r"prompt must be valid Unicode, got 'a.ud800'"):
    prompts.encode(tokenizer, "a\ud800")
