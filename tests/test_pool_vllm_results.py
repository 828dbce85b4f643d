"""A fleet of `vllm serve` answers as one server would, whatever the number of servers, the split and the faults."""

from __future__ import annotations

import asyncio
import base64
import collections
import json
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from conftest import eventually, quick, received
from hypothesis import event, given, settings
from hypothesis import strategies as st
from vllm_sims import Apps, get, post

from trl_pool import (
    AsyncVLLMClientPool,
    InvalidRequestError,
    NoBackendAvailableError,
    RequestRejectedError,
    RolloutError,
    VLLMClientPool,
)
from trl_pool.errors import Outcome
from trl_pool.sim import SimProcess
from trl_pool.sim.engine import Weights, generate, render_chat, score, tokenize
from trl_pool.sim.sampling import Sampling

Fleet = Callable[..., list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]
Background = Callable[..., Future[Any]]

TEXTS = [f"Question {i}: what is {i} times {i + 1}?" for i in range(11)]
IDS = [[1 + i, 2, 3 + 2 * i, 4][: 1 + i % 4] for i in range(9)]
CHATS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {i} squared?"}]
    for i in range(7)
]
SCORES = ("logprobs", "logprob_token_ids", "actual_logprobs", "actual_token_ids")
COLUMNS = ("prompt_ids", "completion_ids", "logprobs", "logprob_token_ids")


class Image:
    """As much of a PIL image as is sent."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def save(self, buffer: Any, format: str) -> None:
        assert format == "PNG"
        buffer.write(self.data)


def one_server(prompts: list[Any], **fields: Any) -> dict[str, Any]:
    """What the engine gives for these prompts, in the form of TRL's dictionary."""
    tokens = [tokenize(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    kwargs = fields.pop("generation_kwargs", {})
    sampling = Sampling.checked({"max_tokens": 16, "logprobs": 0, "top_k": 0, **fields, **kwargs})
    done = generate(tokens, sampling, Weights.checkpoint())
    return {name: getattr(done, name) for name in COLUMNS}


def one_score(sequences: list[list[int]], lengths: list[int], top: int) -> dict[str, Any]:
    """The same for scores. A server has none for a first token."""
    found: dict[str, list[Any]] = {name: [] for name in SCORES}
    for sequence, length in zip(sequences, lengths, strict=True):
        scored = score(sequence, length, Weights.checkpoint())
        logprobs, ids, actual = scored.arrays(top)
        nothing = [float("-inf")] * scored.first
        found["logprobs"].append([[n] * top for n in nothing] + logprobs.tolist())
        found["logprob_token_ids"].append([[0] * top] * scored.first + ids.tolist())
        found["actual_logprobs"].append([[value] for value in [*nothing, *actual.tolist()]])
        found["actual_token_ids"].append([[token] for token in sequence[length:]])
    return found


@pytest.mark.parametrize("backends", [1, 2, 4])
@pytest.mark.parametrize(
    "arguments",
    [
        {"prompts": TEXTS},
        {"prompts": IDS},
        {"prompts": TEXTS[:1]},
        {"prompts": [TEXTS[0]] * 6, "n": 2},
        {"prompts": TEXTS, "n": 3, "max_tokens": 5},
        {"prompts": TEXTS, "logprobs": None},
        {"prompts": IDS, "logprobs": 3, "n": 2},
        {"prompts": TEXTS, "temperature": 0.7, "top_p": 0.9, "top_k": 4, "min_p": 0.05},
        {"prompts": TEXTS, "n": 1, "generation_kwargs": {"n": 2, "seed": 7, "min_tokens": 2}},
        {"prompts": []},
    ],
    ids=lambda arguments: ",".join(f"{k}={v!r:.20}" for k, v in arguments.items()),
)
def test_generate_gives_what_one_server_gives(
    vllm_fleet: Fleet, make_pool: MakePool, backends: int, arguments: dict[str, Any]
) -> None:
    sims = vllm_fleet(4)[:backends]
    assert make_pool(sims).generate(**arguments) == one_server(**arguments)


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"n": 2, "logprobs": 2},
        {"logprobs": None, "chat_template_kwargs": {"enable_thinking": False}, "tools": [TOOL]},
        {"chat_template": "{{ messages }}", "max_tokens": 4},
        {"tools": [], "generation_kwargs": {"n": 3, "seed": 5}},
    ],
    ids=["plain", "n", "tools", "template", "kwargs"],
)
def test_chat_gives_what_one_server_gives(
    vllm_fleet: Fleet, make_pool: MakePool, split: bool, arguments: dict[str, Any]
) -> None:
    template = dict(arguments.get("chat_template_kwargs", {}))
    if "chat_template" in arguments:
        template["chat_template"] = arguments["chat_template"]
    prompts = [render_chat(chat, arguments.get("tools"), template) for chat in CHATS]
    sampling = {k: v for k, v in arguments.items() if k in ("n", "logprobs", "max_tokens", "generation_kwargs")}
    pool = make_pool(vllm_fleet(3), split_batches=split)
    expected = one_server(prompts, **sampling)
    if arguments.get("logprobs"):
        _as_a_chat_has_them(expected, arguments["logprobs"])
    assert pool.chat(CHATS, **arguments) == expected


def _as_a_chat_has_them(answer: dict[str, Any], k: int) -> None:
    """A chat's `top_logprobs` are k with the sampled token among them, where a completion's are k besides it."""
    for tokens, values, ids in zip(
        answer["completion_ids"], answer["logprobs"], answer["logprob_token_ids"], strict=True
    ):
        for place, sampled in enumerate(tokens):
            pairs = list(zip(ids[place], values[place], strict=True))
            pairs = sorted(sorted(pairs, key=lambda pair: pair[0] != sampled)[:k], key=lambda pair: -pair[1])
            ids[place], values[place] = [token for token, _ in pairs], [value for _, value in pairs]


def test_images_of_a_chat_travel_as_data_urls_and_the_callers_conversation_stays(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    image = Image(b"picture")
    part = {"type": "image", "image": image}
    chats = [[{"role": "user", "content": [{"type": "text", "text": f"What is this, {i}?"}, part]}] for i in range(3)]
    url = f"data:image/png;base64,{base64.b64encode(image.data).decode()}"
    sent = {"type": "image_url", "image_url": {"url": url}}
    rendered = [[{"role": "user", "content": [chat[0]["content"][0], sent]}] for chat in chats]
    assert make_pool(vllm_fleet(2)).chat(chats)["prompt_ids"] == [tokenize(render_chat(chat)) for chat in rendered]
    assert all(chat[0]["content"][1] is part for chat in chats)


SEQUENCES = [[*range(5, 7 + i % 5), i] for i in range(13)]
LENGTHS = [i % 3 for i in range(12)] + [len(SEQUENCES[12])]  # the last has no completion at all


@pytest.mark.parametrize("chunk_size", [0, 1, 4])
@pytest.mark.parametrize("top", [0, 4])
def test_scores_are_those_of_one_server(vllm_fleet: Fleet, make_pool: MakePool, chunk_size: int, top: int) -> None:
    pool = make_pool(vllm_fleet(3))
    found = pool.get_sequence_logprobs(SEQUENCES, LENGTHS, top_logprobs=top, chunk_size=chunk_size)
    assert found == one_score(SEQUENCES, LENGTHS, top)


def test_image_features_are_those_of_one_server_and_generate_takes_them(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    sims = vllm_fleet(3)
    pool = make_pool(sims)
    images = [[Image(b"one")], None, [Image(b"two"), Image(b"three")], []]
    features = pool.image_features(images)
    assert [few is None for few in features] == [False, True, False, True]
    places = [few["mm_placeholders"]["image"] for few in features if few is not None]
    assert [len(place) for place in places] == [1, 2]
    prompts = [list(range(1, 200))] * 4
    body = {"sampling_params": {"max_tokens": 5, "top_k": 0, "logprobs": 0}}
    alone = [
        post(sims[0], "/inference/v1/generate", {"token_ids": ids, "features": few, **body}).json()["choices"][0]
        for ids, few in zip(prompts, features, strict=True)
    ]
    found = pool.generate(prompts, features, max_tokens=5)
    assert found["prompt_ids"] == prompts
    assert found["completion_ids"] == [choice["token_ids"] for choice in alone]
    assert found["logprobs"] == [[[t["logprob"]] for t in choice["logprobs"]["content"]] for choice in alone]
    assert found["completion_ids"][0] != found["completion_ids"][1], "the images count"
    assert pool.generate(prompts, features=features, max_tokens=5) == found
    plain = pool.generate(prompts[:2], max_tokens=5)
    assert pool.generate(prompts[:2], features=[None, None], max_tokens=5) == plain


def test_all_completions_of_a_prompt_with_features_come_back(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    found = make_pool(vllm_fleet(2)).generate([[5, 6]] * 3, features=[None] * 3, n=2, logprobs=None)
    assert found == one_server([[5, 6]] * 3, n=2, logprobs=None)


def test_prompts_with_features_keep_a_server_as_busy_as_its_stock_client_does(
    vllm_fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    """One request a prompt, and all of them out at the same time."""
    sims = vllm_fleet(1)
    pool = make_pool(sims, max_inflight_per_backend=1)
    sims[0].faults("hang", endpoints=["generate"])
    call = background(pool.generate, [[i + 1] for i in range(12)], features=[None] * 12)
    eventually(lambda: sims[0].state()["in_flight"] == 12)
    sims[0].clear_faults()
    assert len(call.result()["completion_ids"]) == 12


def test_what_servers_tell_of_themselves_is_passed_on(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims)
    told = get(sims[0], "/server_info?config_format=json").json()["vllm_config"]
    assert pool.get_server_info() == told
    assert told["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert pool.model == "sim-model"
    assert pool.get_world_size() == 2


def test_server_info_is_asked_of_the_next_one_when_one_does_not_answer(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims)
    sims[0].faults("status", status=500, endpoints=["server_info"], times=1)
    assert "model_config" in pool.get_server_info()
    assert received(sims, "server_info") == [2, 2], "once each when they were identified"


def test_the_world_size_is_the_sum_and_one_that_does_not_say_makes_it_an_error() -> None:
    apps = Apps(a={"tensor_parallel_size": 2}, b={"tensor_parallel_size": 2, "data_parallel_size": 2})
    with VLLMClientPool(apps.urls, config=quick(), transport=apps) as pool:
        assert pool.get_world_size() == 6
        apps.apps["b"].faults.add(_fault("get_world_size"))
        with pytest.raises(NoBackendAvailableError, match=r"http://b:8000 .*500"):
            pool.get_world_size()


# Refused before anything is sent


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n": 0}, "n: must be an integer of at least 1"),
        ({"generation_kwargs": {"n": 0}}, "n: must be"),
        ({"generation_kwargs": {"n": True}}, "n: must be"),
        ({"generation_kwargs": {"n": "2"}}, "n: must be"),
        ({"generation_kwargs": {"stream": True}}, "stream: is set by the pool"),
        ({"generation_kwargs": {"prompt": "x"}}, "prompt: is set by the pool"),
        ({"generation_kwargs": {"echo": True}}, "echo: is set by the pool"),
        ({"generation_kwargs": {"return_token_ids": False}}, "return_token_ids: is set by the pool"),
        ({"features": []}, "features: 0 for 1 prompts"),
        ({"features": [None, None]}, "features: 2 for 1 prompts"),
        ({"features": [None], "prompts": ["text"]}, "go with token ids, and there is text at index 0"),
        ({"images": [["a picture"]]}, "image_features"),
        ({"prompts": [[1], []]}, "empty at index 1"),
        ({"prompts": [[1], [-1]]}, "token ids outside"),
        ({"prompts": [[1] * 4096]}, "max_model_len=4096 at index 0"),
        ({"prompts": ["text", [1]]}, "prompts"),
    ],
    ids=str,
)
def test_arguments_that_no_server_could_answer_right_are_refused_and_nothing_is_sent(
    vllm_fleet: Fleet, make_pool: MakePool, arguments: dict[str, Any], said: str
) -> None:
    sims = vllm_fleet(1)
    with pytest.raises(InvalidRequestError, match=said):
        make_pool(sims).generate(**{"prompts": [[1]], **arguments})
    assert received(sims, "completions") == received(sims, "generate") == [0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.0},
        {"top_logprobs": -1},
        {"prompt_lengths": [1, 1]},
        {"prompt_lengths": [4]},
        {"sequences": [[]], "prompt_lengths": [0]},
        {"sequences": [[1] * 4096]},
        {"chunk_size": -1},
    ],
    ids=str,
)
def test_scoring_arguments_that_make_no_sense_are_refused_and_nothing_is_sent(
    vllm_fleet: Fleet, make_pool: MakePool, arguments: dict[str, Any]
) -> None:
    sims = vllm_fleet(1)
    given = {"sequences": [[1, 2, 3]], "prompt_lengths": [1], "top_logprobs": 2, **arguments}
    with pytest.raises(InvalidRequestError):
        make_pool(sims).get_sequence_logprobs(**given)
    assert received(sims, "completions") == [0]


def test_what_a_server_itself_refuses_comes_back_as_its_400_from_one_server(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    sims = vllm_fleet(3)
    pool = make_pool(sims, fail_eject_threshold=1)
    with pytest.raises(RequestRejectedError, match=r"Request failed: 400, .*temperature") as caught:
        pool.generate(["one prompt"], temperature=-1.0)
    assert (caught.value.status, sum(received(sims, "completions"))) == (400, 1)
    with pytest.raises(RequestRejectedError, match="400"):
        pool.chat(CHATS[:1], generation_kwargs={"top_p": 7})
    with pytest.raises(RequestRejectedError, match="404"):
        pool.generate(["x"], generation_kwargs={"model": "no such adapter"})
    assert [(b.ejections, b.inflight, b.failures) for b in pool.statistics().backends] == [(0, 0, 0)] * 3


# Fail-over


@pytest.mark.parametrize(
    ("fault", "failures"),
    [
        ({"kind": "slow", "seconds": 0.2}, 0),
        ({"kind": "busy", "retry_after": 0}, 0),
        ({"kind": "status", "status": 500}, 1),
        ({"kind": "status", "status": 503}, 1),
        ({"kind": "reset"}, 1),
        ({"kind": "reset", "after_bytes": -1}, 1),
        ({"kind": "cut_json"}, 1),
        ({"kind": "invalid_json"}, 1),
        ({"kind": "wrong_count"}, 1),
        ({"kind": "hang"}, 1),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("work", ["generate", "chat", "score"])
def test_a_fault_of_one_server_changes_nothing_in_the_answer(
    vllm_fleet: Fleet, make_pool: MakePool, fault: dict[str, Any], failures: int, work: str
) -> None:
    sims = vllm_fleet(3)
    pool = make_pool(sims, request_timeout=0.6 if fault["kind"] == "hang" else 10)
    endpoint = "chat_completions" if work == "chat" else "completions"
    sims[1].faults(times=1, endpoints=[endpoint], **fault)
    if work == "generate":
        assert pool.generate(TEXTS, n=2) == one_server(TEXTS, n=2)
    elif work == "chat":
        assert pool.chat(CHATS) == one_server([render_chat(chat) for chat in CHATS])
    else:
        assert pool.get_sequence_logprobs(SEQUENCES, LENGTHS, 2) == one_score(SEQUENCES, LENGTHS, 2)
    assert [b.failures for b in pool.statistics().backends] == [0, failures, 0]
    assert [b.ejections for b in pool.statistics().backends] == [0, 0, 0]


def test_a_4xx_of_one_conversation_goes_nowhere_else_and_ends_the_call(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims, fail_eject_threshold=1)
    for sim in sims:
        sim.faults("status", status=422, endpoints=["chat_completions"])
    with pytest.raises(RequestRejectedError, match="Request failed: 422"):
        pool.chat(CHATS[:1])
    assert sum(received(sims, "chat_completions")) == 1
    assert [(b.ejections, b.inflight) for b in pool.statistics().backends] == [(0, 0)] * 2


def test_a_server_killed_among_conversations_loses_none(
    vllm_fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims)
    for sim in sims:
        sim.faults("slow", seconds=0.3)
    call = background(pool.chat, CHATS)
    eventually(lambda: sims[1].state()["in_flight"])
    sims[1].kill()
    assert call.result() == one_server([render_chat(chat) for chat in CHATS])
    assert pool.last_report is not None
    assert {prompt.backend for prompt in pool.last_report.prompts} == {sims[0].url}
    moved = [prompt for prompt in pool.last_report.prompts if prompt.attempts]
    assert {attempt.backend for prompt in moved for attempt in prompt.attempts} == {sims[1].url}


def test_an_aborted_completion_is_no_answer_and_the_prompt_is_served_again(
    vllm_fleet: Fleet, make_pool: MakePool, background: Background
) -> None:
    """`/pause?mode=abort` of somebody else ends requests with 200 and half of their tokens."""
    sims = vllm_fleet(2)
    pool = make_pool(sims)
    post(sims[0], "/pause?mode=keep")
    post(sims[1], "/pause?mode=keep")
    call = background(pool.generate, TEXTS)
    chat = background(pool.chat, CHATS)
    eventually(lambda: all(sim.state()["in_flight"] > 1 for sim in sims))
    for path in ("/abort_requests", "/resume"):
        for sim in sims:
            post(sim, path, {})
    assert call.result() == one_server(TEXTS)
    assert chat.result() == one_server([render_chat(chat) for chat in CHATS])


# The same with every fault that a request can meet, in one process.

COSTLY = ("reset", "time-out")
COMPARED = ("500", "cut", "count", "stranger")
FREE = ("refused", "unreached", "502")
FAULTS = (*COSTLY, *COMPARED, *FREE, "busy", "unavailable")


def _fault(endpoint: str) -> Any:
    from trl_pool.sim.faults import Fault

    return Fault(kind="status", status=500, endpoints=(endpoint,))


class Faulty(Apps):
    """Any number of servers. The k-th request to work, wherever it goes, meets the k-th fault of the script."""

    def __init__(self, app: Any, script: list[str | None]) -> None:
        super().__init__()
        self.app = app
        self.script = list(script)
        self.answered: collections.Counter[str] = collections.Counter()
        self.met: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.apps[request.url.host] = self.app  # they are all alike
        if request.method == "GET":
            return await super().handle_async_request(request)
        fault = self.script.pop(0) if self.script else None
        await asyncio.sleep(0)
        if fault is not None:
            self.met.append(fault)
        match fault:
            case "refused":
                raise httpx.ConnectError("[Errno 111] Connection refused")
            case "unreached":
                raise httpx.ConnectTimeout("no route")
            case "reset":
                raise httpx.ReadError("connection reset by peer")
            case "time-out":
                raise httpx.ReadTimeout("")
            case "500":
                return httpx.Response(500, text="Internal Server Error")
            case "502":
                return httpx.Response(502, text="Bad Gateway")
            case "busy":
                return httpx.Response(429, headers={"retry-after": "0"})
            case "unavailable":
                return httpx.Response(503, headers={"retry-after": "0.001"})
        response = await super().handle_async_request(request)
        await response.aread()
        assert response.status_code == 200, response.text
        answer = response.json()
        match fault:
            case "cut":
                return httpx.Response(200, content=response.content[:-9])
            case "count":
                return httpx.Response(200, json={**answer, "choices": answer["choices"][:-1]})
            case "stranger":  # well formed, and with one more than was asked for
                return httpx.Response(200, json={**answer, "choices": answer["choices"] + answer["choices"][-1:]})
        body = json.loads(request.content)
        units = body.get("prompt") or [body.get("messages") or body["token_ids"]]
        self.answered.update(map(json.dumps, units))
        return httpx.Response(200, content=response.content)


APP = next(iter(Apps(a={}).apps.values()))


@given(
    backends=st.integers(1, 4),
    prompts=st.integers(0, 9),
    n=st.integers(1, 3),
    work=st.sampled_from(["texts", "ids", "features", "chats", "scores"]),
    chunk_size=st.integers(0, 3),
    concurrent=st.integers(1, 4),
    script=st.lists(st.none() | st.sampled_from(FAULTS), max_size=12),
    split=st.booleans(),
    session=st.none() | st.just("s"),
    slots=st.integers(1, 3),
    threshold=st.integers(1, 3),
)
@settings(max_examples=80)
def test_nothing_is_lost_or_doubled_or_misplaced_by_any_plan_and_any_faults(
    backends: int,
    prompts: int,
    n: int,
    work: str,
    chunk_size: int,
    concurrent: int,
    script: list[str | None],
    split: bool,
    session: str | None,
    slots: int,
    threshold: int,
) -> None:
    """Every prompt is answered once, in its place, or named in the error; and named only when the faults were more
    than the rules forgive."""
    servers = Faulty(APP, script)
    units: list[Any] = [f"prompt {i}" if work == "texts" else [i + 1, 7, 7] for i in range(prompts)]
    if work == "chats":
        units = [[{"role": "user", "content": f"chat {i}"}] for i in range(prompts)]

    async def call() -> dict[str, Any]:
        config = quick(
            backoff_seconds=0,
            health_interval=0.02,
            split_batches=split,
            max_inflight_per_backend=slots,
            fail_eject_threshold=threshold,
            cooldown_seconds=0.01,
        )
        urls = [f"http://n{i}:8000" for i in range(backends)]
        async with (
            asyncio.timeout(20),
            AsyncVLLMClientPool(urls, config=config, transport=servers, session_id=session) as pool,
        ):
            try:
                if work == "scores":
                    return await pool.get_sequence_logprobs(units, [1] * prompts, 2, chunk_size=chunk_size)
                if work == "chats":
                    return await pool.chat(units, n=n, max_tokens=4, max_concurrent_requests=concurrent)
                features = [None] * prompts if work == "features" else None
                return await pool.generate(units, n=n, max_tokens=4, features=features)
            finally:
                after = pool.statistics()
                assert after.waiting == 0
                assert all(b.inflight == 0 and b.load == 0 for b in after.backends), repr(pool)
                assert pool.last_report is not None
                served = [prompt.backend is not None for prompt in pool.last_report.prompts]
                assert sum(served) == servers.answered.total()

    def expected(indices: list[int]) -> dict[str, Any]:
        chosen = [units[i] for i in indices]
        if work == "scores":
            return one_score(chosen, [1] * len(chosen), 2)
        return one_server([render_chat(unit) for unit in chosen] if work == "chats" else chosen, n=n, max_tokens=4)

    everything = list(range(prompts))
    try:
        result, error = asyncio.run(call()), None
    except RolloutError as failure:
        event("some prompts without an answer")
        result, error = None, failure
    if error is None:
        assert result == expected(everything)
        answered = everything
    else:
        assert sorted([*error.failed, *error.completed]) == everything
        assert error.failed
        if error.completed:
            assert error.result == expected(error.completed)
        costs = sum(fault in COSTLY for fault in servers.met)
        compared = sum(fault in COMPARED for fault in servers.met)
        rounds = len(servers.met) - servers.met.count("busy") - servers.met.count("unavailable")
        assert costs >= 2 or compared >= 3 or rounds >= 5, "given up too early"
        for attempts in error.failed.values():
            assert sum(a.outcome in (Outcome.LOST, Outcome.TIMED_OUT) for a in attempts) <= 2
        answered = error.completed
    assert servers.answered == collections.Counter(json.dumps(units[i]) for i in answered)
