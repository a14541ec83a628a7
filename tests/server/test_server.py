"""The HTTP server, asked by the client that it is made for."""

import asyncio
import collections
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
import tokenizers
import uvicorn
from flax import nnx
from prometheus_client.parser import text_string_to_metric_families

from paged_jax import models, server
from paged_jax.engine import Engine, EngineConfig, Sampling

NAME, MAX_LENGTH, MAX_REQUESTS, MAX_BYTES = "shakespeare", 128, 4, 20_000
TOKENIZER = models.tokenizer(models.embedded())
TEXTS = ("ROMEO:\nBut", "To be, or not", "First Citizen:")
PROMPTS = [TOKENIZER.encode(text).ids for text in TEXTS]
GREEDY = dict(model=NAME, temperature=0, max_tokens=40)
LONG = dict(model=NAME, prompt=TEXTS[0], max_tokens=120, n=100, seed=1)  # takes a while on 8 rows


@pytest.fixture(scope="module")
def served():
  """An engine, what it draws by itself, its application and its address."""
  decoder = models.load(models.embedded())
  cache = models.cache_config(
    decoder.config, num_pages=64, num_rows=8, max_length=MAX_LENGTH,
    dtype=decoder.embed_tokens.weight.dtype,
  )  # fmt: skip
  engine = Engine(
    decoder, EngineConfig(cache, num_steps=4, prompt_sizes=(32,)), tokenizer=TOKENIZER
  )
  alone = [
    sample for (sample,) in engine.generate(PROMPTS, Sampling(max_new_tokens=40, logprobs="model"))
  ]
  application = server.app(
    engine, NAME, tokenizer=TOKENIZER, max_requests=MAX_REQUESTS, max_choices=100,
    max_bytes=MAX_BYTES,
  )  # fmt: skip
  with listening(application) as url:
    yield engine, alone, application, url
  engine.close()


@contextlib.contextmanager
def listening(application):
  listener = socket.create_server(("127.0.0.1", 0))
  config = uvicorn.Config(application, log_level="warning", lifespan="off", ws="none")
  running = uvicorn.Server(config)
  thread = threading.Thread(target=running.run, args=([listener],))
  thread.start()
  yield f"http://127.0.0.1:{listener.getsockname()[1]}"
  running.should_exit = True
  thread.join(timeout=60)
  assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(served):
  with openai.OpenAI(base_url=f"{served[-1]}/v1", api_key="none", max_retries=0) as client:
    yield client


@pytest.fixture(scope="module")
def http(served):
  with httpx.Client(base_url=served[-1], timeout=60) as http:
    yield http


@pytest.fixture(autouse=True)
def nothing_left(served):
  """After each test all pages are free, or kept for prefixes only."""
  yield
  idle(served[0])


def idle(engine):
  deadline = time.monotonic() + 30
  while (stats := engine.manager.stats()).running or stats.swapped:
    assert time.monotonic() < deadline, stats
    time.sleep(0.01)
  assert stats.free_pages + stats.reclaimable_pages == stats.num_pages


def collect(stream):
  """Text and reason of each choice, and usage; the reason comes last."""
  texts, reasons, usage = collections.defaultdict(str), {}, None
  for chunk in stream:
    usage = chunk.usage or usage
    for choice in chunk.choices:
      assert choice.index not in reasons
      texts[choice.index] += choice.text
      if choice.finish_reason:
        reasons[choice.index] = choice.finish_reason
  return texts, reasons, usage


# What is asked for


def test_a_completion_is_the_engines_own(client, served):
  done = client.completions.create(prompt=TEXTS[0], **GREEDY)
  (choice,) = done.choices
  assert choice.text == served[1][0].text
  assert (choice.finish_reason, choice.logprobs, done.model) == ("length", None, NAME)
  assert done.id.startswith("cmpl-") and done.object == "text_completion"
  prompt = len(PROMPTS[0])
  usage = (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens)
  assert usage == (prompt, 40, prompt + 40)


@pytest.mark.parametrize("prompt", [list(TEXTS), PROMPTS, [TEXTS[0], *PROMPTS[1:]]])
def test_several_prompts_are_texts_or_tokens(client, served, prompt):
  done = client.completions.create(prompt=prompt, **GREEDY)
  assert [choice.index for choice in done.choices] == [0, 1, 2]
  assert [choice.text for choice in done.choices] == [sample.text for sample in served[1]]
  assert done.usage.prompt_tokens == sum(map(len, PROMPTS))


def test_streams_are_the_whole_in_pieces(client):
  wanted = dict(model=NAME, prompt=list(TEXTS), n=2, seed=7, max_tokens=30, temperature=0.9)
  whole = client.completions.create(**wanted)
  stream = client.completions.create(**wanted, stream=True, stream_options=dict(include_usage=True))
  texts, reasons, usage = collect(stream)
  assert texts == {choice.index: choice.text for choice in whole.choices}
  assert reasons == dict.fromkeys(range(6), "length")
  assert usage == whole.usage
  assert len({*texts.values()}) == 6


def test_events_are_in_the_format(http):
  body = dict(GREEDY, prompt=TEXTS[0], max_tokens=5, stream=True)
  with http.stream("POST", "/v1/completions", json=body) as reply:
    assert reply.headers["content-type"] == "text/event-stream"
    *events, done, end = reply.read().decode().split("\n\n")
  assert (done, end) == ("data: [DONE]", "")
  for event in events:
    chunk = json.loads(event.removeprefix("data: "))
    assert {*chunk} == {"id", "object", "created", "model", "choices"}
    assert {*chunk["choices"][0]} == {"index", "text", "logprobs", "finish_reason"}


def test_seeds_are_random_unless_given(client):
  wanted = dict(model=NAME, prompt=TEXTS[0], max_tokens=30)
  texts = [client.completions.create(**wanted).choices[0].text for _ in range(2)]
  assert texts[0] != texts[1]


@pytest.mark.parametrize("several", [False, True])
def test_stop_strings_end_a_text_and_are_no_part_of_it(client, served, several):
  text = served[1][0].text
  stop = text[20:24]
  wanted = dict(GREEDY, prompt=TEXTS[0], stop=["absent", stop] if several else stop)
  done = client.completions.create(**wanted)
  assert (done.choices[0].text, done.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
  assert done.usage.completion_tokens < 40
  texts, reasons, _ = collect(client.completions.create(**wanted, stream=True))
  assert texts == {0: text[: text.index(stop)]}  # no piece was taken back
  assert reasons == {0: "stop"}


def test_stop_tokens_end_a_text(client, served):
  tokens = served[1][0].tokens
  wanted = dict(GREEDY, prompt=TEXTS[0], extra_body=dict(stop_token_ids=[tokens[5]]))
  done = client.completions.create(**wanted)
  assert done.usage.completion_tokens == tokens.index(tokens[5]) + 1
  assert done.choices[0].finish_reason == "stop"


def test_pieces_are_whole_characters(client):
  first, second = TOKENIZER.token_to_id("Ã"), TOKENIZER.token_to_id("©")  # the bytes of é
  wanted = dict(
    model=NAME, prompt=TEXTS[0], max_tokens=30, temperature=2, seed=3,
    logit_bias={first: 100, second: 100},
  )  # fmt: skip
  whole = client.completions.create(**wanted).choices[0].text
  stream = client.completions.create(**wanted, stream=True)
  pieces = [choice.text for chunk in stream for choice in chunk.choices]
  assert "".join(pieces) == whole
  assert "é" in whole and {*whole} <= {"é", "\ufffd"}
  assert len(pieces) > 3


def test_logprobs_are_those_of_the_tokens_drawn(client, served):
  sample = served[1][0]
  wanted = dict(GREEDY, prompt=TEXTS[0], logprobs=1)
  (choice,) = client.completions.create(**wanted).choices
  told = choice.logprobs
  assert told.token_logprobs == pytest.approx(sample.logprobs, abs=0.05)
  assert "".join(told.tokens) == choice.text
  for token, offset in zip(told.tokens, told.text_offset, strict=True):
    assert choice.text.startswith(token, offset)
  parts = [
    choice.logprobs
    for chunk in client.completions.create(**wanted, stream=True)
    for choice in chunk.choices
    if choice.logprobs
  ]
  for name in ("tokens", "text_offset", "token_logprobs"):
    assert [x for part in parts for x in getattr(part, name)] == getattr(told, name)


def test_fields_beyond_openais_reach_the_engine(client, served):
  extra = dict(top_k=1, min_p=0.5, repetition_penalty=1.0, priority=3)
  wanted = dict(GREEDY, prompt=TEXTS[0], temperature=1.5, extra_body=extra)
  assert client.completions.create(**wanted).choices[0].text == served[1][0].text
  extra["repetition_penalty"] = 2.0
  assert client.completions.create(**wanted).choices[0].text != served[1][0].text


def test_what_neutral_or_null_fields_ask_for_is_nothing(client, served):
  neutral = dict(
    best_of=1, echo=False, presence_penalty=0, frequency_penalty=0.0, suffix=None, user="me",
    logit_bias={},
  )  # fmt: skip
  done = client.completions.create(prompt=TEXTS[0], **GREEDY, **neutral)
  assert done.choices[0].text == served[1][0].text


def test_without_max_tokens_there_are_16_or_what_is_left(client):
  wanted = dict(model=NAME, temperature=0)
  assert client.completions.create(prompt=PROMPTS[0], **wanted).usage.completion_tokens == 16
  assert client.completions.create(prompt=[1] * 125, **wanted).usage.completion_tokens == 3


def test_the_longest_text_is_taken(client):
  wanted = dict(model=NAME, prompt=PROMPTS[0], max_tokens=MAX_LENGTH - len(PROMPTS[0]))
  done = client.completions.create(**wanted)
  assert done.usage.total_tokens == MAX_LENGTH


# Side by side


def test_streams_run_side_by_side(served):
  async def ask(client, prompt):
    pieces = []
    async for chunk in await client.completions.create(prompt=prompt, **GREEDY, stream=True):
      pieces.append(chunk.choices[0].text)
    return "".join(pieces)

  async def everybody():
    async with openai.AsyncOpenAI(
      base_url=f"{served[-1]}/v1", api_key="none", max_retries=0
    ) as client:
      return await asyncio.gather(*(ask(client, text) for text in TEXTS))

  assert asyncio.run(everybody()) == [sample.text for sample in served[1]]


def test_a_client_that_leaves_cancels_its_request_and_no_other(client, http, served):
  engine, alone, application, _ = served
  before = ended(http)["cancelled"]
  drawn = engine.counts.drawn_tokens
  stream = client.completions.create(**LONG, stream=True)
  next(iter(stream))
  other = client.completions.create(prompt=TEXTS[1], **GREEDY, extra_body=dict(priority=1))
  stream.close()
  with pytest.raises(httpx.ReadTimeout):  # the same without a stream
    http.post("/v1/completions", json=LONG, timeout=0.3)
  idle(engine)
  assert other.choices[0].text == alone[1].text
  assert not application.state.in_flight
  assert ended(http)["cancelled"] > before + 100
  assert engine.counts.drawn_tokens - drawn < 200 * 120


def test_a_client_can_leave_any_server(served):
  """From ASGI 2.4 on, starlette itself notices only that a send fails."""
  engine, _, application, _ = served
  body = json.dumps(LONG | dict(stream=True)).encode()
  messages = [dict(type="http.request", body=body)]

  async def receive():
    if messages:
      return messages.pop()
    await asyncio.sleep(0.2)
    return dict(type="http.disconnect")

  async def ask():
    scope = dict(
      type="http", asgi=dict(spec_version="2.4"), method="POST", path="/v1/completions",
      headers=[], query_string=b"",
    )  # fmt: skip
    await application(scope, receive, lambda message: asyncio.sleep(0))
    idle(engine)

  drawn = engine.counts.drawn_tokens
  asyncio.run(ask())
  assert not application.state.in_flight
  assert engine.counts.drawn_tokens - drawn < 100 * 120


def ended(http):
  """Samples so far by why they ended."""
  samples = collections.Counter()
  for family in text_string_to_metric_families(http.get("/metrics").text):
    for sample in family.samples:
      if sample.name == "paged_jax_samples_ended_total":
        samples[sample.labels["reason"]] = sample.value
  return samples


def test_too_many_requests_are_refused_until_one_has_gone(client, served):
  streams = [client.completions.create(**LONG, stream=True) for _ in range(MAX_REQUESTS)]
  with pytest.raises(openai.RateLimitError, match="4 requests are in flight") as refused:
    client.completions.create(prompt=TEXTS[0], **GREEDY)
  assert refused.value.code == "rate_limit_exceeded"
  for stream in streams:
    stream.close()
  idle(served[0])
  assert client.completions.create(prompt=TEXTS[0], **GREEDY).choices


def test_a_request_that_the_engine_ends_is_an_error(client, served):
  *_, application, _ = served
  stream = client.completions.create(**LONG, stream=True)
  next(iter(stream))
  for response in tuple(application.state.in_flight):
    response.cancel()
  with pytest.raises(openai.APIError, match="the request was cancelled"):
    collect(stream)


# What is refused

BAD = [
  (dict(model="other"), 404, "model", "there is no model 'other', only 'shakespeare'"),
  (dict(model=None), 400, "model", "you must provide a model parameter"),
  (dict(model=""), 400, "model", "you must provide a model parameter"),
  (dict(model="\ud800"), 404, "model", "there is no model '\\ud800'"),
  (dict(prompt=None), 400, "prompt", "prompt is empty"),
  (dict(prompt=""), 400, "prompt", "prompt is empty, got ''"),
  (dict(prompt=[]), 400, "prompt", "prompt is empty, got []"),
  (dict(prompt=["a", ""]), 400, "prompt", "prompt is empty, got ''"),
  (dict(prompt=[[1], []]), 400, "prompt", "prompt is empty"),
  (dict(prompt=7), 400, "prompt", "'prompt': Input should be a text, tokens, or a list of either, got 7"),
  (dict(prompt=[True]), 400, "prompt", "a text, tokens, or a list of either, got [True]"),
  (dict(prompt=[1, "a"]), 400, "prompt", "a text, tokens, or a list of either, got [1, 'a']"),
  (dict(prompt=[512]), 400, "prompt", "prompt has token 512, but the vocabulary has 512"),
  (dict(prompt=[[1], [-1]]), 400, "prompt", "prompt has token -1"),
  (dict(prompt=[1] * 128), 400, "prompt", "prompt has 128 tokens, but the model takes 128, new"),
  (dict(prompt="\ud800"), 400, "prompt", "prompt must be valid Unicode, got '\\ud800'"),
  (dict(max_tokens=0), 400, "max_tokens", "greater than or equal to 1, got 0"),
  (dict(max_tokens=-1), 400, "max_tokens", "got -1"),
  (dict(max_tokens=2.0), 400, "max_tokens", "got 2.0"),
  (dict(max_tokens=126), 400, "max_tokens", "max_tokens is 126, but a prompt of 3 tokens leaves 125"),
  (dict(max_tokens=True), 400, "max_tokens", "got True"),
  (dict(temperature=float("nan")), 400, "temperature", "less than or equal to 2, got nan"),
  (dict(temperature=float("inf")), 400, "temperature", "got inf"),
  (dict(temperature="1"), 400, "temperature", "got '1'"),
  (dict(temperature=10**400), 400, "temperature", "got 1000"),
  (dict(top_p=0), 400, "top_p", "greater than or equal to 0.000001, got 0"),
  (dict(top_k=0), 400, "top_k", "greater than or equal to 1, got 0"),
  (dict(top_k=2**31), 400, "top_k", "got 2147483648"),
  (dict(min_p=2), 400, "min_p", "got 2"),
  (dict(repetition_penalty=0), 400, "repetition_penalty", "got 0"),
  (dict(n=0), 400, "n", "'n': Input should be greater than or equal to 1, got 0"),
  (dict(n=10**9), 400, "n", "got 1000000000"),
  (dict(n=51, prompt=[[1], [2]]), 400, "n", "n is 51 for 2 prompts, but 100 choices are the most"),
  (dict(seed=-1), 400, "seed", "got -1"),
  (dict(seed=2**32), 400, "seed", "got 4294967296"),
  (dict(stop=""), 400, "stop", "'stop.0': String should have at least 1 character, got ''"),
  (dict(stop=[1]), 400, "stop", "'stop.0': Input should be a valid string, got 1"),
  (dict(stop=["a"] * 17), 400, "stop", "at most 16 items"),
  (dict(stop=["a" * 257]), 400, "stop", "at most 256 characters, got 'aaa"),
  (dict(stop_token_ids=[512]), 400, "stop_token_ids", "stop_token_ids has token 512"),
  (dict(stop_token_ids=[1] * 9), 400, "stop_token_ids", "at most 8 items"),
  (dict(stop_token_ids=3), 400, "stop_token_ids", "got 3"),
  (dict(logit_bias={"512": 1}), 400, "logit_bias", "logit_bias has token 512"),
  (dict(logit_bias={"a": 1}), 400, "logit_bias", "'logit_bias.a.[key]': String should match"),
  (dict(logit_bias={"1": float("nan")}), 400, "logit_bias", "'logit_bias.1': Input should be less"),
  (dict(logit_bias={"1": 101}), 400, "logit_bias", "less than or equal to 100, got 101"),
  (dict(logit_bias={"1": -101}), 400, "logit_bias", "greater than or equal to -100, got -101"),
  (dict(logit_bias={str(i): 1 for i in range(17)}), 400, "logit_bias", "at most 16 items"),
  (dict(logit_bias=[1]), 400, "logit_bias", "got [1]"),
  (dict(logprobs=2), 400, "logprobs", "less than or equal to 1, got 2"),
  (dict(logprobs=True), 400, "logprobs", "got True"),
  (dict(priority=0.5), 400, "priority", "got 0.5"),
  (dict(stream=1), 400, "stream", "'stream': Input should be a valid boolean, got 1"),
  (dict(stream_options={}), 400, "stream_options", "must be absent unless stream is true"),
  (dict(stream=True, stream_options=dict(x=1)), 400, "stream_options", "be 'include_usage', got 'x'"),
  (dict(stream=True, stream_options=dict(include_usage=1)), 400, "stream_options", "boolean, got 1"),
  (dict(stream=True, stream_options=[]), 400, "stream_options", "got []"),
  (dict(add_special_tokens=1), 400, "add_special_tokens", "a valid boolean, got 1"),
  (dict(user=1), 400, "user", "'user': Input should be a valid string, got 1"),
  (dict(best_of=2), 400, "best_of", "'best_of': Input should be 1, got 2"),
  (dict(echo=True), 400, "echo", "Input should be False, got True"),
  (dict(suffix="x"), 400, "suffix", "got 'x'"),
  (dict(presence_penalty=0.5), 400, "presence_penalty", "got 0.5"),
  (dict(frequency_penalty=[]), 400, "frequency_penalty", "got []"),
  (dict(colour="red\ud800"), 400, None, "'colour': Extra inputs are not permitted, got 'red\\ud800'"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "param", "message"), BAD, ids=range(len(BAD)))
def test_bad_fields_are_named_with_their_values(http, fields, status, param, message):
  body = dict(model=NAME, prompt=[1, 2, 3]) | fields
  reply = http.post("/v1/completions", content=json.dumps(body))
  error = reply.json()["error"]
  assert (reply.status_code, error["param"]) == (status, param), error
  assert message in error["message"]
  assert error["type"] == "invalid_request_error" and "code" in error


@pytest.mark.parametrize(
  ("method", "path", "content", "status", "message"),
  [
    ("POST", "/v1/completions", b"{", 400, "the body is not JSON"),
    ("POST", "/v1/completions", b"", 400, "the body is not JSON"),
    ("POST", "/v1/completions", b"\xff\xfe\xff", 400, "the body is not JSON"),
    ("POST", "/v1/completions", b"[" * 15_000, 400, "the body is not JSON"),
    ("POST", "/v1/completions", b"9" * 5_000, 400, "the body is not JSON"),
    ("POST", "/v1/completions", b"[1]", 400, "the body must be a JSON object, got [1]"),
    ("POST", "/v1/completions", b" " * 20_001, 413, "the body has more than 20000 bytes"),
    ("GET", "/v1/completions", b"", 405, "GET /v1/completions: Method Not Allowed"),
    ("POST", "/v1/chat/completions", b"{}", 404, "POST /v1/chat/completions: Not Found"),
    ("GET", "/v1/models/other", b"", 404, "there is no model 'other', only 'shakespeare'"),
  ],
)
def test_bad_requests_are_answered_in_the_format(http, method, path, content, status, message):
  reply = http.request(method, path, content=content)
  assert reply.status_code == status
  assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize(
  ("method", "path", "status", "allowed"),
  [
    ("GET", "/v1/completions", 405, {"POST"}),
    ("HEAD", "/v1/completions", 405, {"POST"}),
    ("OPTIONS", "/v1/completions", 405, {"POST"}),
    ("POST", "/v1/models", 405, {"GET", "HEAD"}),
    ("DELETE", f"/v1/models/{NAME}", 405, {"GET", "HEAD"}),
    ("OPTIONS", "/metrics", 405, {"GET", "HEAD"}),
    ("HEAD", "/health", 200, set()),
    ("GET", "/nowhere", 404, set()),
  ],
)
def test_methods_that_are_refused_come_with_those_that_are_not(http, method, path, status, allowed):
  reply = http.request(method, path)
  assert reply.status_code == status
  assert {*filter(None, reply.headers.get("allow", "").split(", "))} == allowed


def test_the_client_knows_the_errors(client):
  with pytest.raises(openai.NotFoundError) as refused:
    client.completions.create(model="other", prompt="a")
  assert refused.value.code == "model_not_found"
  with pytest.raises(openai.BadRequestError, match="max_tokens is 300") as refused:
    client.completions.create(model=NAME, prompt=[1], max_tokens=300, stream=True)
  assert refused.value.param == "max_tokens"


# Around it


def test_there_is_one_model(client):
  assert [model.id for model in client.models.list()] == [NAME]
  assert client.models.retrieve(NAME).owned_by == "paged_jax"


def test_metrics_say_what_was_done(client, http, served):
  assert http.get("/health").json() == {"status": "ok"}
  drawn, before = served[0].counts.drawn_tokens, ended(http)["length"]
  client.completions.create(prompt=TEXTS[0], n=2, **GREEDY)
  families = {x.name: x for x in text_string_to_metric_families(http.get("/metrics").text)}
  values = {s.name: s.value for family in families.values() for s in family.samples}
  assert values["paged_jax_drawn_tokens_total"] == drawn + 80
  assert ended(http)["length"] == before + 2
  assert values["paged_jax_num_pages"] == 64
  assert values["paged_jax_time_to_first_token_seconds_count"] > 0
  assert values["paged_jax_time_per_token_seconds_count"] > 0
  states = {s.labels["state"]: s.value for s in families["paged_jax_requests"].samples}
  assert states == {"running": 0, "waiting": 0}
  kinds = {s.labels["kind"] for s in families["paged_jax_preemptions"].samples}
  assert kinds == {"swap", "recompute"}


def test_a_model_without_a_tokenizer_takes_and_gives_tokens(served):
  engine, alone, *_ = served
  with listening(server.app(engine, NAME)) as url, httpx.Client(base_url=url) as http:
    body = dict(GREEDY, prompt=TEXTS[0])
    assert "must be tokens" in http.post("/v1/completions", json=body).json()["error"]["message"]
    (choice,) = http.post("/v1/completions", json=body | dict(prompt=PROMPTS[0])).json()["choices"]
    assert choice["text"] == " ".join(map(str, alone[0].tokens))


def test_the_tokenizers_own_tokens_can_be_left_out(served):
  tokenizer = tokenizers.Tokenizer.from_str(TOKENIZER.to_str())
  begin = tokenizer.id_to_token(5)
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=[begin, "$A"], special_tokens=[(begin, 5)]
  )
  application = server.app(served[0], NAME, tokenizer=tokenizer)
  with listening(application) as url, httpx.Client(base_url=url, timeout=60) as http:

    def ask(prompt, **fields):
      reply = http.post("/v1/completions", json=GREEDY | dict(prompt=prompt) | fields)
      return reply.json()["choices"][0]["text"], reply.json()["usage"]["prompt_tokens"]

    own, bare = ask([5, *PROMPTS[0]]), ask(PROMPTS[0])
    assert ask(TEXTS[0]) == ask(TEXTS[0], add_special_tokens=True) == own != bare
    assert ask(TEXTS[0], add_special_tokens=False) == bare
    assert ask([5, *PROMPTS[0]], add_special_tokens=False) == own  # tokens stay as they are


# A real process


@pytest.fixture
def folder(tmp_path):
  """A checkpoint with one token per byte that compiles in seconds."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(dict(zip(alphabet, range(256))), []))
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  config = models.DecoderConfig(
    vocab_size=256, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=8, max_length=4096, windows=(None,), ropes=(models.Rope(),), tied=True,
  )  # fmt: skip
  models.save(models.Decoder(config, rngs=nnx.Rngs(0)), tmp_path / "bytes")
  tokenizer.save(str(tmp_path / "bytes" / "tokenizer.json"))
  return tmp_path / "bytes"


@contextlib.contextmanager
def serving(folder):
  """The command, when it has said where it is, and its address."""
  command = [sys.executable, "-m", "paged_jax.cli.main", "serve", "--model", folder, "--port", "0"]
  command += ["--prompt-size", "16", "--num-rows", "4", "--num-host-pages", "0"]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    try:
      line = process.stdout.readline()
      assert line.startswith("bytes is at http://127.0.0.1:"), (line, process.stderr.read())
      yield process, line.split()[-1]
      assert process.wait(60) == 130
      # steps, full hits, prompts: of requests that adjust logits, and of others
      compiling = [f"compiling {n}/6" for n in range(1, 7)]
      assert process.stderr.read().splitlines() == ["loading bytes", *compiling]
    finally:
      process.kill()


@pytest.mark.once
def test_the_command_serves_until_interrupted(folder):
  with (
    serving(folder) as (process, url),
    openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
  ):
    wanted = dict(model="bytes", prompt="abc")
    assert client.completions.create(**wanted).usage.completion_tokens == 16
    stream = client.completions.create(**wanted, max_tokens=4000, n=16, stream=True)
    next(iter(stream))
    process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="the request was cancelled"):
      collect(stream)


def test_the_command_can_be_interrupted_before_its_first_request(folder):
  with serving(folder) as (process, _):
    process.send_signal(signal.SIGINT)
