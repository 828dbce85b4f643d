"""The simulated `vllm serve`: every endpoint, as a real server of vLLM 0.31 answers it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from vllm_sims import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    MODEL,
    RENDER,
    USER,
    complete,
    error,
    events,
    expected,
    get,
    post,
    started,
    tokens,
    unspoilt,
)

from trl_pool.sim import SimProcess
from trl_pool.sim.config import SimConfig
from trl_pool.sim.engine import Weights, detokenize, render_chat, score, tokenize
from trl_pool.sim.ledger import prompt_key

TRAITS: dict[str, dict[str, Any]] = {
    "plain": {"max_model_len": 64, "vocab_size": 512},
    "odd": {
        "model": "other-model",
        "vllm_version": "0.32.1",
        "tensor_parallel_size": 2,
        "data_parallel_size": 3,
        "max_logprobs": 20,
        "dtype": "float16",
        "logprobs_mode": "raw_logprobs",
        "api_key": "secret",
        "weight_transfer": "none",
    },
    "old": {"vllm_version": "0.25.1", "trust_request_chat_template": True},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
PNG = base64.b64encode(b"no picture, and nobody looks").decode()
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
KEY = {"authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def fleet() -> Iterator[dict[str, SimProcess]]:
    with started(**TRAITS) as sims:
        yield sims


@pytest.fixture
def sim(fleet: dict[str, SimProcess]) -> SimProcess:
    return unspoilt(fleet["plain"])


@pytest.fixture
def odd(fleet: dict[str, SimProcess]) -> SimProcess:
    return fleet["odd"]


# Who it is.


def test_health_is_200_with_an_empty_body(sim: SimProcess) -> None:
    health = get(sim, "/health")
    assert (health.status_code, health.content) == (200, b"")
    assert health.headers["server"] == "trl-pool-sim"


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/version", "/get_world_size"])
def test_paths_with_a_slash_redirect(sim: SimProcess, path: str) -> None:
    response = get(sim, path + "/")
    assert response.status_code == 307
    assert response.headers["location"] == sim.url + path


def test_it_tells_who_it_is(sim: SimProcess, odd: SimProcess) -> None:
    assert get(sim, "/version").json() == {"version": "0.31.0"}
    assert get(sim, "/get_world_size").json() == {"world_size": 1}
    (card,) = get(sim, "/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"], card["parent"]) == (MODEL, 64, None)
    assert get(odd, "/version").json() == {"version": "0.32.1"}
    assert get(odd, "/get_world_size").json() == {"world_size": 6}
    assert get(odd, "/get_world_size?include_dp=false").json() == {"world_size": 2}


def test_server_info_has_what_its_clients_read(sim: SimProcess, odd: SimProcess) -> None:
    info = get(sim, "/server_info", params={"config_format": "json"}).json()["vllm_config"]
    model = info["model_config"]
    assert (model["model"], model["max_model_len"], model["dtype"]) == (MODEL, 64, "torch.bfloat16")
    assert model["logprobs_mode"] == "processed_logprobs"
    assert info["weight_transfer_config"] == {"backend": "control"}
    assert info["parallel_config"]["tensor_parallel_size"] == 1
    other = get(odd, "/server_info?config_format=json").json()["vllm_config"]
    assert other["model_config"]["dtype"] == "torch.float16"
    assert other["model_config"]["logprobs_mode"] == "raw_logprobs"
    assert other["weight_transfer_config"] is None
    assert isinstance(get(sim, "/server_info").json()["vllm_config"], str)
    assert error(get(sim, "/server_info?config_format=x")) == (400, "Bad Request", "query.config_format")


def test_an_unknown_path_and_a_wrong_method_are_fastapis(sim: SimProcess) -> None:
    assert (get(sim, "/nothing").status_code, get(sim, "/nothing").json()) == (404, {"detail": "Not Found"})
    assert get(sim, COMPLETIONS).status_code == 405
    assert get(sim, "/pause").status_code == 405


# Completions.


def test_completions_are_the_engines_prompt_major(sim: SimProcess) -> None:
    fields: dict[str, Any] = {"n": 2, "seed": 3, "logprobs": 0, "return_tokens_as_token_ids": True}
    answer = complete(sim, ["Hello", "Tschüß"], **fields)
    assert [c["token_ids"] for c in answer["choices"]] == expected("Hello", "Tschüß", n=2, seed=3)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    prompts = [tokenize("Hello")] * 2 + [tokenize("Tschüß")] * 2
    assert [c["prompt_token_ids"] for c in answer["choices"]] == prompts
    assert {c["finish_reason"] for c in answer["choices"]} == {"length"}
    sampled = sum(len(c["token_ids"]) for c in answer["choices"])
    used = answer["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"]) == (5 + 8, sampled)
    assert used["total_tokens"] == 13 + sampled
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"


def test_the_trl_dialect_samples_the_same_tokens(fleet: dict[str, SimProcess]) -> None:
    sim = fleet["old"]
    with SimProcess() as other:

        def theirs(path: str, **body: Any) -> dict[str, Any]:
            answer: dict[str, Any] = post(other, path, {"max_tokens": 6, **body}).raise_for_status().json()
            return answer

        prompts = {"prompts": ["Hello", "World"], "n": 2, "generation_kwargs": {"seed": 5}}
        assert tokens(sim, ["Hello", "World"], n=2, seed=5) == theirs("/generate/", **prompts)["completion_ids"]

        chat = {"tools": [TOOL], "chat_template_kwargs": {"x": 1}}
        told = theirs("/chat/", messages=[[USER]], **chat)
        body = {"messages": [USER], "max_tokens": 6, "tool_choice": "none", "return_token_ids": True, **chat}
        ours = post(sim, CHAT, body).json()
        assert [ours["choices"][0]["token_ids"]] == told["completion_ids"]
        assert [ours["prompt_token_ids"]] == told["prompt_ids"]

        # Processed images go along with token ids in one dialect, pictures with texts in the other.
        features = post(sim, RENDER, {"messages": [{"role": "user", "content": [IMAGE]}]}).json()["features"]
        features["mm_placeholders"]["image"] = [{"offset": 0, "length": 1}]
        body = {"token_ids": tokenize("Hello"), "features": features, "sampling_params": {"max_tokens": 6}}
        (generated,) = post(sim, GENERATE, body).json()["choices"]
        told = theirs("/generate/", prompts=["Hello"], images=[[PNG]])
        assert [generated["token_ids"]] == told["completion_ids"] != expected("Hello")


@pytest.mark.parametrize(
    ("prompt", "as_ids"),
    [("ab", [[97, 98]]), ([97, 98], [[97, 98]]), (["a", "b"], [[97], [98]]), ([[97], [98]], [[97], [98]])],
)
def test_a_prompt_is_a_text_or_ids_or_a_list_of_either(sim: SimProcess, prompt: Any, as_ids: list[list[int]]) -> None:
    choices = complete(sim, prompt)["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == as_ids
    assert choices[0]["token_ids"] == tokens(sim, as_ids)[0]


def test_logprobs_have_the_sampled_token_first_and_up_to_k_more(sim: SimProcess) -> None:
    fields = {"seed": 1, "max_tokens": 8}
    (bare,) = complete(sim, logprobs=0, return_tokens_as_token_ids=True, **fields)["choices"]
    names = [f"token_id:{i}" for i in bare["token_ids"]]
    assert bare["logprobs"]["tokens"] == names
    assert [list(top) for top in bare["logprobs"]["top_logprobs"]] == [[name] for name in names]
    (more,) = complete(sim, logprobs=2, return_tokens_as_token_ids=True, **fields)["choices"]
    for name, value, top in zip(
        names, more["logprobs"]["token_logprobs"], more["logprobs"]["top_logprobs"], strict=True
    ):
        assert next(iter(top.items())) == (name, value)
        assert len(top) in (2, 3)  # two most likely, and the sampled one if it is not among them
    (told,) = complete(sim, logprobs=0, **fields)["choices"]
    assert told["logprobs"]["tokens"] == [detokenize([i]) for i in told["token_ids"]]
    assert complete(sim, **fields)["choices"][0]["logprobs"] is None


def test_prompt_logprobs_score_a_sequence(sim: SimProcess) -> None:
    """What TRL's client reads: rank, logprob, and the actual token whether it is among the first or not."""
    sequence = [5, 6, 7, 8]
    body = {"prompt": [sequence, [9, 10]], "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 3}
    first, second = post(sim, COMPLETIONS, body).json()["choices"]
    assert len(second["prompt_logprobs"]) == 2
    logprobs, ids = score(sequence, 0, Weights.checkpoint()).lists(3)
    assert first["prompt_logprobs"][0] is None
    for position in range(1, 4):
        row = first["prompt_logprobs"][position]
        assert next(iter(row)) == str(sequence[position])
        ranked = sorted(row.items(), key=lambda item: item[1]["rank"])
        assert [int(i) for i, _ in ranked] == ids[position]
        assert [one["logprob"] for _, one in ranked] == pytest.approx(logprobs[position])
        assert [one["rank"] for _, one in ranked[:3]] == [1, 2, 3]
    (bare,) = post(sim, COMPLETIONS, {"prompt": sequence, "max_tokens": 1, "prompt_logprobs": 0}).json()["choices"]
    assert [row and list(row) for row in bare["prompt_logprobs"]] == [None, ["6"], ["7"], ["8"]]


def test_an_end_or_stop_token_ends_a_completion_and_is_not_in_its_text(sim: SimProcess) -> None:
    (free,) = complete(sim, max_tokens=20, ignore_eos=True, seed=2)["choices"]
    assert (len(free["token_ids"]), free["finish_reason"], free["stop_reason"]) == (20, "length", None)
    stop = free["token_ids"][3]
    (ended,) = complete(sim, max_tokens=20, ignore_eos=True, seed=2, stop_token_ids=[stop])["choices"]
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", stop)
    assert ended["token_ids"] == free["token_ids"][: len(ended["token_ids"])]
    assert ended["text"] == detokenize(ended["token_ids"][:-1])


def test_a_completion_without_max_tokens_has_16(sim: SimProcess) -> None:
    body = {"prompt": [5], "ignore_eos": True, "return_token_ids": True}
    for more in ({}, {"max_tokens": None}):
        (choice,) = post(sim, COMPLETIONS, {**body, **more}).json()["choices"]
        assert len(choice["token_ids"]) == 16


def test_ids_of_requests_are_kept(sim: SimProcess) -> None:
    assert complete(sim, request_id="mine")["id"] == "cmpl-mine"
    answer = post(sim, COMPLETIONS, {"prompt": "x"}, headers={"x-request-id": "theirs"}).json()
    assert answer["id"] == "cmpl-theirs"


# Refusals.

REFUSED: list[tuple[str, dict[str, Any], tuple[int, str, str | None]]] = [
    (COMPLETIONS, {"model": "nope", "prompt": [5]}, (404, "NotFoundError", "model")),
    (COMPLETIONS, {"prompt": [5] * 65, "max_tokens": 1}, (400, "BadRequestError", "input_tokens")),
    (COMPLETIONS, {"prompt": [5] * 64, "max_tokens": 1}, (400, "BadRequestError", "input_tokens")),
    (COMPLETIONS, {"prompt": [5] * 60}, (400, "BadRequestError", "input_tokens")),
    (COMPLETIONS, {"prompt": [[5], [5] * 64], "max_tokens": 1}, (400, "BadRequestError", "input_tokens")),
    (COMPLETIONS, {"prompt": [512]}, (400, "BadRequestError", None)),
    (COMPLETIONS, {"prompt": [[]]}, (400, "BadRequestError", None)),
    (COMPLETIONS, {"prompt": []}, (400, "BadRequestError", None)),
    (COMPLETIONS, {"prompt": ""}, (400, "BadRequestError", "prompt")),
    (COMPLETIONS, {}, (400, "BadRequestError", "prompt")),
    (COMPLETIONS, {"prompt": [[5]] * 1025}, (400, "BadRequestError", "prompt")),
    (COMPLETIONS, {"prompt": [5], "n": 0}, (400, "BadRequestError", None)),
    (COMPLETIONS, {"prompt": [5], "n": 2, "temperature": 0}, (400, "BadRequestError", None)),
    (COMPLETIONS, {"prompt": [5], "max_tokens": 0}, (400, "BadRequestError", "max_tokens")),
    (COMPLETIONS, {"prompt": [5], "temperature": -1}, (400, "BadRequestError", "temperature")),
    (COMPLETIONS, {"prompt": [5], "top_p": 0}, (400, "BadRequestError", "top_p")),
    (COMPLETIONS, {"prompt": [5], "logprobs": -2}, (400, "BadRequestError", "logprobs")),
    (COMPLETIONS, {"prompt": [5], "logprobs": 513}, (400, "BadRequestError", "logprobs")),
    (COMPLETIONS, {"prompt": [5], "stop_token_ids": [512]}, (400, "BadRequestError", "stop_token_ids")),
    (COMPLETIONS, {"prompt": [5], "structured_outputs": {"regex": "("}}, (400, "BadRequestError", None)),
    (
        COMPLETIONS,
        {"prompt": [5], "stream_options": {"include_usage": True}},
        (400, "BadRequestError", "stream_options"),
    ),
    (COMPLETIONS, {"prompt": [5], "n": "two"}, (400, "Bad Request", "body.n")),
    (COMPLETIONS, {"prompt": [5], "seed": 2**63}, (400, "Bad Request", "body.seed")),
    (COMPLETIONS, {"prompt": ["a", [5]]}, (400, "Bad Request", "body.prompt.0")),
    (CHAT, {"model": "nope", "messages": [USER]}, (404, "NotFoundError", "model")),
    (CHAT, {"messages": []}, (400, "BadRequestError", None)),
    (CHAT, {}, (400, "Bad Request", "body.messages")),
    (CHAT, {"messages": [{"content": "x"}]}, (400, "Bad Request", "body.messages")),
    (CHAT, {"messages": [USER], "max_tokens": 64}, (400, "BadRequestError", "input_tokens")),
    (CHAT, {"messages": [USER], "top_logprobs": 2}, (400, "BadRequestError", "top_logprobs")),
    (CHAT, {"messages": [USER], "tools": []}, (400, "BadRequestError", "tools")),
    (CHAT, {"messages": [USER], "tools": [TOOL]}, (400, "BadRequestError", None)),
    (RENDER, {"model": "nope", "messages": [USER]}, (404, "NotFoundError", "model")),
    (GENERATE, {"model": "nope", "token_ids": [5], "sampling_params": {}}, (404, "NotFoundError", "model")),
    (GENERATE, {"token_ids": [], "sampling_params": {}}, (400, "Bad Request", "body.token_ids")),
    (GENERATE, {"token_ids": [-5], "sampling_params": {}}, (400, "Bad Request", "body.token_ids")),
    (GENERATE, {"token_ids": [5]}, (400, "Bad Request", "body.sampling_params")),
    (GENERATE, {"token_ids": [5] * 64, "sampling_params": {}}, (400, "BadRequestError", None)),
    (GENERATE, {"token_ids": [512], "sampling_params": {}}, (400, "BadRequestError", None)),
    (GENERATE, {"token_ids": [5], "sampling_params": {"n": 0}}, (400, "BadRequestError", None)),
    (
        GENERATE,
        {
            "token_ids": [5],
            "features": {"mm_hashes": {"image": ["h"]}, "mm_placeholders": {"image": [{"offset": 0, "length": 2}]}},
            "sampling_params": {},
        },
        (400, "Bad Request", "body"),
    ),
    ("/v1/load_lora_adapter", {"lora_name": "a"}, (400, "Bad Request", "body.lora_path")),
    ("/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""}, (400, "InvalidUserInput", None)),
    ("/v1/load_lora_adapter", {"lora_name": MODEL, "lora_path": "/"}, (400, "InvalidUserInput", None)),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/nowhere"}, (404, "NotFoundError", None)),
    ("/v1/unload_lora_adapter", {"lora_name": "a"}, (404, "NotFoundError", None)),
    ("/pause?mode=sleep", {}, (400, "Bad Request", "query.mode")),
    ("/init_weight_transfer_engine", {}, (400, "Bad Request", None)),
    ("/update_weights", {}, (400, "Bad Request", None)),
    ("/finish_weight_update", {"weight_version": 3}, (400, "Bad Request", "body.weight_version")),
    ("/update_weight_version", {}, (400, "Bad Request", "body.new_version")),
]


@pytest.mark.parametrize(("path", "body", "answer"), REFUSED)
def test_what_is_wrong_is_refused_with_openais_body_and_does_no_harm(
    sim: SimProcess, path: str, body: dict[str, Any], answer: tuple[int, str, str | None]
) -> None:
    assert error(post(sim, path, body)) == answer
    assert tokens(sim) == expected("Hello")


def test_a_body_that_is_no_json_is_a_400(sim: SimProcess) -> None:
    broken = post(sim, COMPLETIONS, content=b"{nope", headers={"content-type": "application/json"})
    assert error(broken)[:2] == (400, "Bad Request")
    assert error(post(sim, COMPLETIONS, content=b"{}")) == (400, "Bad Request", None)
    assert error(post(sim, "/abort_requests")) == (400, "Bad Request", None)


def test_fields_that_it_does_not_know_are_ignored(sim: SimProcess) -> None:
    assert tokens(sim, sede=3) == expected("Hello")
    body = {"token_ids": tokenize("Hello"), "sampling_params": {"max_tokens": 6, "sede": 3}}
    assert post(sim, GENERATE, body).json()["choices"][0]["token_ids"] == expected("Hello")[0]


def test_more_logprobs_than_allowed_are_refused(odd: SimProcess) -> None:
    body: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 1, "prompt_logprobs": 20}
    assert post(odd, COMPLETIONS, body, headers=KEY).status_code == 200
    for field in ("logprobs", "prompt_logprobs"):
        for number in (21, -1):
            response = post(odd, COMPLETIONS, {**body, field: number}, headers=KEY)
            assert error(response) == (400, "BadRequestError", field)


# Chats.


def test_a_chat_is_rendered_and_continued(sim: SimProcess) -> None:
    body = {"model": MODEL, "messages": [USER], "n": 2, "max_tokens": 3, "return_token_ids": True, "seed": 1}
    answer = post(sim, CHAT, body).json()
    prompt = render_chat([USER])
    assert answer["prompt_token_ids"] == tokenize(prompt)
    assert [choice["token_ids"] for choice in answer["choices"]] == expected(prompt, n=2, seed=1, max_tokens=3)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"] == detokenize(answer["choices"][0]["token_ids"])
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")


def test_a_chat_without_max_tokens_fills_the_context(sim: SimProcess) -> None:
    answer = post(sim, CHAT, {"messages": [USER], "ignore_eos": True}).json()
    assert answer["usage"]["total_tokens"] == 64
    short = post(sim, CHAT, {"messages": [USER], "ignore_eos": True, "max_tokens": 9, "max_completion_tokens": 2})
    assert short.json()["usage"]["completion_tokens"] == 2


def test_chat_logprobs_are_the_first_k_of_the_sampled_and_the_most_likely(sim: SimProcess) -> None:
    body = {"messages": [USER], "max_tokens": 4, "logprobs": True, "return_tokens_as_token_ids": True}
    for k in (0, 1, 3):
        (choice,) = post(sim, CHAT, {**body, "top_logprobs": k, "return_token_ids": True}).json()["choices"]
        for token, entry in zip(choice["token_ids"], choice["logprobs"]["content"], strict=True):
            assert entry["token"] == f"token_id:{token}"
            assert len(entry["top_logprobs"]) == k
            assert all(top["token"].startswith("token_id:") for top in entry["top_logprobs"])
            assert k == 0 or entry["top_logprobs"][0]["token"] == entry["token"]
    (choice,) = post(sim, CHAT, {**body, "logprobs": False, "top_logprobs": None}).json()["choices"]
    assert choice["logprobs"] is None


def test_tools_and_templates_change_the_prompt(fleet: dict[str, SimProcess]) -> None:
    sim = fleet["old"]

    def prompt(**fields: Any) -> str:
        answer = post(sim, CHAT, {"messages": [USER], "max_tokens": 1, "return_token_ids": True, **fields}).json()
        return detokenize(answer["prompt_token_ids"])

    found = {
        prompt(),
        prompt(chat_template_kwargs={"x": 1}),
        prompt(tools=[TOOL], tool_choice="none"),
        prompt(chat_template="t"),
        prompt(add_generation_prompt=False),
    }
    assert len(found) == 5


def test_a_template_in_the_request_must_be_trusted(odd: SimProcess) -> None:
    response = post(odd, CHAT, {"messages": [USER], "chat_template": "t"}, headers=KEY)
    assert error(response) == (400, "BadRequestError", None)


# Rendering, and generating from what was rendered.


def test_rendering_gives_what_generate_takes(sim: SimProcess) -> None:
    answer = post(sim, RENDER, {"model": MODEL, "messages": [USER], "max_tokens": 2, "temperature": 0.5}).json()
    assert answer["token_ids"] == tokenize(render_chat([USER]))
    assert answer["features"] is None
    assert (answer["sampling_params"]["max_tokens"], answer["sampling_params"]["temperature"]) == (2, 0.5)
    fields = ("request_id", "model", "token_ids", "features", "sampling_params")
    generated = post(sim, GENERATE, {name: answer[name] for name in fields}).json()
    assert len(generated["choices"][0]["token_ids"]) == 2


def test_images_become_features_whose_places_are_in_the_prompt(fleet: dict[str, SimProcess]) -> None:
    sim = fleet["old"]
    content = [{"type": "text", "text": "a"}, IMAGE, IMAGE]
    answer = post(sim, RENDER, {"messages": [{"role": "user", "content": content}], "max_tokens": 1}).json()
    features = answer["features"]
    (first, second) = features["mm_placeholders"]["image"]
    assert first["offset"] + first["length"] == second["offset"]
    for place in (first, second):
        shown = detokenize(answer["token_ids"][place["offset"] : place["offset"] + place["length"]])
        assert shown.startswith("<|image_url:")
    assert features["mm_hashes"]["image"][0] == features["mm_hashes"]["image"][1]
    assert features["kwargs_data"] == {"image": [PNG, PNG]}


def test_generate_takes_features_and_other_images_give_other_tokens(sim: SimProcess) -> None:
    def sampled(data: str | None) -> list[int]:
        features = data and {
            "mm_hashes": {"image": ["h"]},
            "mm_placeholders": {"image": [{"offset": 0, "length": 2}]},
            "kwargs_data": {"image": [data]},
        }
        body = {"token_ids": tokenize("Hello"), "features": features, "sampling_params": {"max_tokens": 6}}
        found: list[int] = post(sim, GENERATE, body).json()["choices"][0]["token_ids"]
        return found

    assert sampled(None) == expected("Hello")[0]
    assert len({tuple(sampled(data)) for data in (None, "one", "two")}) == 3


def test_generate_has_logprobs_with_the_sampled_token(sim: SimProcess) -> None:
    sampling = {"n": 2, "max_tokens": 3, "logprobs": 0, "output_kind": 2}
    body = {"request_id": "trl-1", "model": MODEL, "token_ids": [5, 6], "features": None, "sampling_params": sampling}
    answer = post(sim, GENERATE, body).json()
    assert answer["request_id"] == "generate-tokens-trl-1"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        for token, entry in zip(choice["token_ids"], choice["logprobs"]["content"], strict=True):
            assert entry["token"] == f"token_id:{token}"
            assert [top["token"] for top in entry["top_logprobs"]] == [entry["token"]]


def test_generate_without_max_tokens_fills_the_context_and_with_too_many_too(sim: SimProcess) -> None:
    for fields in ({}, {"max_tokens": 100}):
        body = {"token_ids": [5] * 60, "sampling_params": {"ignore_eos": True, **fields}}
        assert len(post(sim, GENERATE, body).json()["choices"][0]["token_ids"]) == 4


# Streams.


def test_a_streamed_completion_is_the_same_token_by_token(sim: SimProcess) -> None:
    fields: dict[str, Any] = {"prompt": ["Hello", "Tschüß"], "n": 2, "max_tokens": 5, "logprobs": 1, "seed": 4}
    fields |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
    whole = post(sim, COMPLETIONS, fields).json()["choices"]
    chunks = events(post(sim, COMPLETIONS, {**fields, "stream": True}))
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert [token for c in own for token in c["token_ids"]] == choice["token_ids"]
        assert all(len(c["token_ids"]) == 1 for c in own)
        assert "".join(c["text"] for c in own) == choice["text"]
        assert own[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert {repr(c["prompt_token_ids"]) for c in own[1:]} <= {"None"}
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        tops = [top for c in own for top in c["logprobs"]["top_logprobs"]]
        assert tops == choice["logprobs"]["top_logprobs"]


def test_a_streamed_chat_begins_with_the_roles(sim: SimProcess) -> None:
    fields: dict[str, Any] = {"messages": [USER], "n": 2, "max_tokens": 4, "logprobs": True, "top_logprobs": 0}
    fields |= {"return_token_ids": True}
    whole = post(sim, CHAT, fields).json()
    chunks = events(post(sim, CHAT, {**fields, "stream": True}))
    assert [c["choices"][0]["delta"] for c in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        own = [c for chunk in chunks[2:] for c in chunk["choices"] if c["index"] == choice["index"]]
        assert [token for c in own for token in c["token_ids"]] == choice["token_ids"]
        assert "".join(c["delta"]["content"] for c in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, {"prompt": [5, 6]}), (CHAT, {"messages": [USER]})])
def test_usage_comes_last_in_a_stream_if_asked_for(sim: SimProcess, path: str, body: dict[str, Any]) -> None:
    body = {**body, "max_tokens": 3, "ignore_eos": True, "stream": True}
    assert not any("usage" in chunk for chunk in events(post(sim, path, body)))
    *chunks, last = events(post(sim, path, {**body, "stream_options": {"include_usage": True}}))
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)
    assert not any("usage" in chunk for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = events(post(sim, path, {**body, "stream_options": options}))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks][-3:] == [1, 2, 3]


def test_what_is_wrong_with_a_stream_is_known_before_it_begins(sim: SimProcess) -> None:
    response = post(sim, COMPLETIONS, {"prompt": [5] * 64, "max_tokens": 1, "stream": True})
    assert error(response) == (400, "BadRequestError", "input_tokens")
    response = post(sim, COMPLETIONS, {"prompt": [5], "stream": True, "prompt_logprobs": 1})
    assert error(response) == (400, "BadRequestError", "prompt_logprobs")


# Adapters.


def make_adapter(directory: Path, content: str = "weights") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_text(content)
    return directory


def test_an_adapter_answers_to_its_name_and_changes_tokens(sim: SimProcess, tmp_path: Path) -> None:
    body = {"lora_name": "a1", "lora_path": str(make_adapter(tmp_path / "one")), "load_inplace": False}
    loaded = post(sim, "/v1/load_lora_adapter", body)
    assert loaded.status_code == 200
    assert "a1" in loaded.text
    cards = get(sim, "/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [(MODEL, None), ("a1", MODEL)]
    answer = complete(sim, model="a1")
    assert answer["model"] == "a1"
    assert [answer["choices"][0]["token_ids"]] != tokens(sim) == expected("Hello")
    assert error(post(sim, "/v1/load_lora_adapter", body)) == (400, "InvalidUserInput", None)
    assert sim.state()["adapters"] == {"a1": body["lora_path"]}

    make_adapter(tmp_path / "one", "other weights")
    assert tokens(sim, model="a1") == [answer["choices"][0]["token_ids"]]  # read when it is loaded
    post(sim, "/v1/load_lora_adapter", {**body, "load_inplace": True}).raise_for_status()
    assert tokens(sim, model="a1") != [answer["choices"][0]["token_ids"]]

    assert post(sim, "/v1/unload_lora_adapter", {"lora_name": "a1"}).status_code == 200
    assert error(post(sim, COMPLETIONS, {"model": "a1", "prompt": "x"})) == (404, "NotFoundError", "model")


def test_servers_with_the_same_adapter_give_the_same_tokens(
    sim: SimProcess, fleet: dict[str, SimProcess], tmp_path: Path
) -> None:
    servers = (sim, fleet["old"])
    for number, server in enumerate(servers):
        path = make_adapter(tmp_path / str(number))
        post(server, "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": str(path)}).raise_for_status()
    assert tokens(servers[0], model="a") == tokens(servers[1], model="a")


# Starting, keys, releases, and what is remembered.


@pytest.mark.parametrize(
    "option", [{"weight_transfer": "telepathy"}, {"unfinished_update": "fine"}, {"vllm_version": "newest"}]
)
def test_options_that_cannot_be_are_refused_at_the_start(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        SimConfig(dialect="vllm", **option)


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed")
def test_gloo_is_refused_at_the_start_where_there_is_no_torch() -> None:
    sim = SimProcess(dialect="vllm", weight_transfer="gloo")
    with pytest.raises(RuntimeError, match="needs torch"):
        sim.wait_ready()
    sim.stop()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing"])
def test_a_key_guards_openais_paths(odd: SimProcess, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        response = get(odd, path, headers=headers)
        assert (response.status_code, response.json()) == (401, {"error": "Unauthorized"})
    assert get(odd, path, headers=KEY).status_code in (200, 404)


def test_a_key_guards_nothing_else(odd: SimProcess) -> None:
    assert post(odd, GENERATE, {}).status_code == 401
    for path in ("/health", "/version", "/server_info", "/get_world_size", "/is_paused", "/weight_info"):
        assert get(odd, path).status_code == 200
    assert post(odd, "/reset_prefix_cache").json() == {"success": True}
    assert post(odd, "/start_weight_update", {}).status_code == 500  # it has no weight transfer engine


def test_a_release_has_its_endpoints(fleet: dict[str, SimProcess]) -> None:
    old, new, sim = fleet["old"], fleet["odd"], fleet["plain"]
    assert post(sim, "/shutdown_weight_transfer_engine").status_code == 404
    assert post(new, "/shutdown_weight_transfer_engine").status_code == 500
    assert get(old, "/weight_info").status_code == 404
    assert post(old, "/abort_requests", {}).status_code == 404
    reset = post(old, "/reset_prefix_cache")
    assert (reset.status_code, reset.content) == (200, b"")


def test_the_state_tells_who_asked_for_what(sim: SimProcess) -> None:
    complete(sim, [[1, 2], [3]], n=2)
    post(sim, CHAT, {"messages": [USER]}, headers={"user-agent": "me"})
    post(sim, GENERATE, {"token_ids": [1, 2], "sampling_params": {"n": 3}})
    get(sim, "/v1/models")
    state = sim.state()
    found = [(r["endpoint"], r["prompts"], r["n"], r["status"]) for r in state["requests"]]
    assert found == [
        ("completions", 2, 2, 200),
        ("chat_completions", 1, 1, 200),
        ("generate", 1, 3, 200),
        ("models", 0, None, 200),
    ]
    assert state["requests"][0]["prompt_keys"] == [prompt_key([1, 2]), prompt_key([3])]
    assert state["requests"][2]["prompt_keys"] == [prompt_key([1, 2])]
    assert state["requests"][1]["user_agent"] == "me"
    assert state["endpoints"]["models"]["answered"] == 1
