"""Text as it comes: whatever the pieces, it reads as the tokenizer reads all of it at once."""

import itertools
import time
from typing import NamedTuple

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from paged_jax.engine.text import Reader, Vocabulary, numbers

CORPUS = [
  "To be, or not to be: that is the question.",
  "é you 你好 မမ 🌶️ naïve — don't",
  "a  b\n\nc",
]
SPECIAL = "<|im_end|>"


def byte_level():
  """GPT-2's kind, with few merges, so that most characters are several tokens."""
  words = tokenizers.Tokenizer(models.BPE())
  words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  words.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=alphabet, special_tokens=[SPECIAL], show_progress=False
  )
  words.train_from_iterator(CORPUS, trainer)
  return words


def byte_fallback():
  """Llama 2's kind: a byte per token for what is no word of the vocabulary."""
  pieces = ["▁", "▁to", "▁be", "t", "o", "b", "e", "a", "c", "to", "be", "▁a", "é", "▁▁"]
  vocab = {f"<0x{i:02X}>": i for i in range(256)}
  for piece in ["<unk>", *pieces]:
    vocab[piece] = len(vocab)
  merges = [("t", "o"), ("b", "e"), ("▁", "to"), ("▁", "be"), ("▁", "a"), ("▁", "▁")]
  model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
  words = tokenizers.Tokenizer(model)
  words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  words.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  words.add_special_tokens([SPECIAL])
  return words


def word_piece():
  """BERT's kind: pieces that begin with ## go on, others have a space before them."""
  words = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
  words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  words.decoder = decoders.WordPiece(prefix="##")
  special = ["[UNK]", SPECIAL]
  trainer = tokenizers.trainers.WordPieceTrainer(
    vocab_size=90, special_tokens=special, show_progress=False
  )
  words.train_from_iterator(CORPUS, trainer)
  return words


BYTE_LEVEL, BYTE_FALLBACK, WORD_PIECE = byte_level(), byte_fallback(), word_piece()
KINDS = {"byte_level": BYTE_LEVEL, "byte_fallback": BYTE_FALLBACK, "word_piece": WORD_PIECE}
KIND = st.sampled_from(sorted(KINDS))
LETTERS = "tobeac é你မ🌶\ufe0f\n.,'"
TEXTS = st.text(st.sampled_from(LETTERS) | st.characters(exclude_categories=["Cs"]), max_size=40)


class Text(NamedTuple):
  """How the new tokens of a prompt read, all at once."""

  tokenizer: object
  prompt: tuple = ()
  stops: tuple = ()

  def reader(self):
    return Reader(Vocabulary(self.tokenizer), self.prompt, self.stops)

  def decode(self, tokens):
    """What `tokens` add to the prompt's text, up to a stop."""
    reader = self.reader()
    reader.add(tokens)
    reader.finish()
    return reader.text

  def settled(self, tokens):
    """The part of `decode` that no further token changes."""
    reader = self.reader()
    reader.add(tokens)
    return reader.text

  def end(self, tokens):
    """How many of `tokens` it takes to complete a stop, None if there is none in them."""
    return self.reader().add(tokens)


def read(words, prompt, tokens, stops=(), sizes=()):
  """A reader that has had all tokens, in chunks of `sizes`, and how many it took."""
  reader, count = Reader(Vocabulary(words), prompt, stops), 0
  sizes = itertools.chain(sizes, itertools.repeat(1))
  while count < len(tokens):
    chunk = tokens[count : count + next(sizes)]
    before = reader.text
    end = reader.add(chunk)
    assert reader.text.startswith(before)  # what has been told stays true
    if end is not None:
      return reader, count + end
    count += len(chunk)
  reader.finish()
  return reader, None


def whole(words, prompt, tokens):
  """The text of new tokens, by the tokenizer's own reading of everything."""
  return words.decode([*prompt, *tokens])[len(words.decode(prompt)) :]


def replaced(tokens):
  """How byte-fallback tokens read if some of their bytes are no characters."""
  text, run = "", b""
  for token in [*tokens, None]:
    if token is not None and token < 256:
      run += bytes([token])
      continue
    text, run = text + run.decode("utf-8", "replace"), b""
    if token is not None:
      text += BYTE_FALLBACK.id_to_token(token).replace("▁", " ")
  return text.removeprefix(" ")


def streams(kind, text, data):
  words = KINDS[kind]
  encoding = words.encode(text, add_special_tokens=False)
  at = data.draw(st.integers(0, len(encoding.ids)))
  prompt, tokens = encoding.ids[:at], encoding.ids[at:]
  reader, end = read(
    words, prompt, tokens, sizes=data.draw(st.lists(st.integers(1, 5), min_size=60))
  )
  assert end is None and len(reader.pieces) == len(tokens)
  if kind == "word_piece":
    assert reader.text == whole(words, prompt, tokens)
  elif tokens:  # a character that the prompt begins belongs to the new text
    assert reader.text == text[encoding.offsets[at][0] if at else 0 :]


def broken(kind, data):
  words = KINDS[kind]
  ids = st.integers(0, words.get_vocab_size() + 1)  # broken bytes, special ones, unknown ones
  tokens = data.draw(st.lists(ids, max_size=60))
  reader, _ = read(words, (), tokens, sizes=data.draw(st.lists(st.integers(1, 5), min_size=60)))
  known = [token for token in tokens if token < words.get_vocab_size()]
  if kind == "byte_fallback":
    special = words.token_to_id(SPECIAL)
    assert reader.text == replaced([token for token in known if token != special])
  else:
    assert reader.text == words.decode(known)


def stopped(kind, text, data):
  words = KINDS[kind]
  ids = words.encode(text, add_special_tokens=False).ids
  for at in data.draw(st.lists(st.integers(0, len(ids)), max_size=2)):
    ids.insert(at, words.token_to_id(SPECIAL))
  at = data.draw(st.integers(0, len(ids)))
  prompt, tokens = ids[:at], ids[at:]
  plain, _ = read(words, prompt, tokens)
  names = Vocabulary(words).specials
  seen = [names.get(token, piece) for token, piece in zip(tokens, plain.pieces)]
  everything = "".join(seen)
  parts = st.tuples(st.integers(0, len(everything)), st.integers(1, 6))
  cuts = [everything[i : i + n] for i, n in data.draw(st.lists(parts, min_size=1, max_size=3))]
  stops = tuple(cut for cut in cuts if cut) or ("no such text",)
  reader, end = read(
    words, prompt, tokens, stops, sizes=data.draw(st.lists(st.integers(1, 5), min_size=60))
  )
  found = [(everything.find(stop) + len(stop), everything.find(stop)) for stop in stops
           if stop in everything]  # fmt: skip
  if plain.pieces and plain.pieces[-1].endswith("\ufffd"):
    return  # the last character is known to be broken only when no stop counts any more
  if not found:
    assert end is None and reader.text == plain.text
    return
  ends = list(itertools.accumulate(map(len, seen)))
  assert end == next(n for n, length in enumerate(ends, start=1) if length >= min(found)[0])
  text, left = "", min(found)[1]
  for token, piece in zip(tokens, seen):
    text += "" if token in names else piece[:left]
    left -= len(piece[:left])
  assert reader.text == text


PROPERTIES = {streams: (KIND, TEXTS, st.data()), broken: (KIND, st.data()),
              stopped: (KIND, TEXTS, st.data())}  # fmt: skip


def check(holds, **fields):
  settings(deadline=None, database=None, **fields)(given(*PROPERTIES[holds])(holds))()


def test_streamed_text_is_the_whole_text_whatever_the_pieces():
  check(streams, max_examples=100, derandomize=True)


def test_any_tokens_read_as_all_at_once():
  check(broken, max_examples=100, derandomize=True)


def test_a_text_ends_before_the_stop_that_is_complete_first():
  check(stopped, max_examples=100, derandomize=True)


@pytest.mark.sweep
@pytest.mark.timeout(1200)
def test_texts_for_ten_minutes():
  until = time.monotonic() + 600
  while time.monotonic() < until:
    for holds in PROPERTIES:
      check(holds, max_examples=500)


# By hand.


def tokens_of(text):
  return BYTE_LEVEL.encode(text).ids


def fallback(text):
  return [*text.encode()]


def test_half_a_character_is_held_back():
  text = Text(BYTE_LEVEL, tuple(tokens_of("x")))
  tokens = tokens_of("n💡")
  assert len(tokens) > 3
  assert text.settled(tokens[:-1]) == "n" and text.settled(tokens) == "n💡"
  assert text.decode(tokens[:-1]) == "n\ufffd"


def test_a_cut_character_leaves_those_before_it():
  text = Text(BYTE_FALLBACK, ())
  cut = [*"🌶你".encode()][:5]
  assert text.settled(cut) == "🌶" and text.decode(cut) == "🌶\ufffd"


def test_a_prompt_that_ends_inside_a_character_goes_on():
  first, *rest = fallback("你")
  assert Text(BYTE_FALLBACK, (first,)).decode(rest) == "你"
  first, *rest = tokens_of("💡")
  assert Text(BYTE_LEVEL, (first,)).decode(rest) == "💡"
  assert Text(BYTE_LEVEL, (first,), ("💡",)).end([*rest, 1]) == len(rest)
  assert Text(BYTE_LEVEL, (first,)).decode(tokens_of("a")) == "a"  # nothing comes of it
  assert Text(BYTE_LEVEL, tuple(tokens_of("\ufffd"))).decode(tokens_of("a")) == "a"
  to = BYTE_FALLBACK.token_to_id("to")
  for rest, text in (([to], "to"), ([0xFF, to], "\ufffdto"), ([*"é".encode(), to], "éto")):
    assert Text(BYTE_FALLBACK, (0xE4,)).decode(rest) == text
  assert Text(BYTE_FALLBACK, (0xE4,), ("to",)).decode([to]) == ""


def test_the_first_space_does_not_show_and_later_ones_do():
  to = BYTE_FALLBACK.token_to_id("▁to")
  for tokens in ([32], [32, 32], [32, to], [to, 32, to], [to]):
    assert Text(BYTE_FALLBACK, ()).decode(tokens) == BYTE_FALLBACK.decode(tokens)


def test_a_prompt_may_end_in_many_special_tokens():
  special, to = BYTE_FALLBACK.token_to_id(SPECIAL), BYTE_FALLBACK.token_to_id("▁to")
  for count in (1, 15, 16, 17, 100):
    assert Text(BYTE_FALLBACK, (to, *[special] * count)).decode([to]) == " to"


def test_a_stop_may_come_first():
  text = Text(BYTE_LEVEL, tuple(tokens_of("x")), ("you",))
  assert text.end(tokens_of("you")) == len(tokens_of("you")) and not text.decode(tokens_of("you"))


def test_special_tokens_stop_and_do_not_show():
  special = BYTE_LEVEL.token_to_id(SPECIAL)
  text = Text(BYTE_LEVEL, (), (SPECIAL,))
  tokens = [*tokens_of("a"), special, *tokens_of("b")]
  assert text.end(tokens) == 2 and text.decode(tokens) == "a"
  assert Text(BYTE_LEVEL, ()).decode(tokens) == "ab"
  across = Text(BYTE_LEVEL, (), ("end|>b",))
  assert across.end(tokens) == 3 and across.decode(tokens) == "a"


def test_what_may_begin_a_stop_is_held_back():
  text = Text(BYTE_LEVEL, tuple(tokens_of("x")), ("\n\n", "END"))
  assert text.settled(tokens_of("one\n")) == "one"
  assert text.settled(tokens_of("one\ntwo EN")) == "one\ntwo "
  assert text.settled(tokens_of("one\ntwo ENT")) == "one\ntwo ENT"
  assert text.decode(tokens_of("one END\n\n")) == "one "


@pytest.mark.parametrize(
  "stops, text, kept",
  [
    (("b", "abc"), "xabc", "xa"),
    (("bc", "abc"), "xabc", "x"),  # complete at once: the longest one
    (("aab",), "aaab", "a"),
    (("abab", "ba"), "abab", "a"),
    (("aa", "aaa"), "baaa", "b"),
  ],
)
def test_stops_may_overlap(stops, text, kept):
  tokens = fallback(text)
  assert Text(BYTE_FALLBACK, (), stops).decode(tokens) == kept


def test_nothing_is_decoded_twice_or_from_the_beginning():
  class Counting:
    def __init__(self):
      self.asked = []

    def decode(self, ids):
      self.asked.append(len(ids))
      return "".join(chr(97 + i) for i in ids)

  words = Counting()
  text = Text(words, tuple(range(20)), ("never",))
  text.end([i % 26 for i in range(1000)])
  assert max(words.asked) <= 17 and len(words.asked) < 1200


def test_a_decoder_that_never_sees_a_whole_character_is_not_waited_for():
  lead = BYTE_LEVEL.token_to_id("Ċ")  # a newline
  broken = next(i for i in range(300) if BYTE_LEVEL.decode([i]) == "\ufffd")
  text = Text(BYTE_LEVEL, ())
  assert text.settled([broken] * 50) == "\ufffd" * 49
  assert text.decode([broken] * 50 + [lead]) == "\ufffd" * 50 + "\n"


def test_tokens_that_read_as_nothing_change_nothing():
  broken = next(i for i in range(300) if BYTE_LEVEL.decode([i]) == "\ufffd")
  beyond = BYTE_LEVEL.get_vocab_size() + 7
  for count in (1, 15, 16, 17, 40):
    tokens = [broken, *[beyond] * count, *tokens_of(" be")]
    assert Text(BYTE_LEVEL, tuple(tokens_of("to"))).decode(tokens) == "\ufffd be"
  first, *rest = "é".encode()
  assert Text(BYTE_FALLBACK, ()).decode([first, 9999, *rest]) == "é"


def test_tokens_without_a_tokenizer_read_as_numbers():
  assert "".join(numbers([3, 40, 5])) == "3 40 5" and numbers([3, 40, 5], 1) == [" 40", " 5"]


def test_a_tokenizer_of_transformers_shape_is_read_by_its_own_tokenizer():
  class Fast:
    backend_tokenizer = BYTE_LEVEL

    def decode(self, ids):
      raise AssertionError("shows special tokens")

  assert Text(Fast(), ()).decode(tokens_of("né")) == "né"


def test_post_processors_do_not_matter():
  words = byte_level()
  words.post_processor = processors.ByteLevel()
  assert Text(words, ()).decode(words.encode("you").ids) == "you"
