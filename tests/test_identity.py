"""Who a server is: found out by asking, compared with the others, and refused where it does not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from conftest import eventually, quick
from test_server_process import Gateway
from vllm_sims import Apps

from trl_pool import (
    BackendMismatchError,
    BackendsUnreachableError,
    NoBackendAvailableError,
    VLLMClientPool,
)
from trl_pool.identity import Identity
from trl_pool.sim import SimProcess

Fleet = Callable[..., list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]

KEY = "sk-very-secret"


@pytest.fixture
def pool_of() -> Iterator[Callable[..., VLLMClientPool]]:
    """`pool_of(apps, **settings)`: a pool over servers in this process, closed after the test."""
    pools = []

    def make(apps: Apps, urls: list[str] | None = None, **settings: Any) -> VLLMClientPool:
        api_key = settings.pop("api_key", None)
        pool = VLLMClientPool(urls or apps.urls, config=quick(**settings), transport=apps, api_key=api_key)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


PoolOf = Callable[..., VLLMClientPool]


# By itself


@pytest.mark.parametrize(
    ("version", "development", "keeps"),
    [
        ("0.27.1", True, True),
        ("0.27.0", True, False),
        ("0.27", True, False),
        ("0.31.0+cpu", True, True),
        ("0.31.0+cpu", False, False),
        ("0.28.0rc1", True, True),
        ("1.0", True, True),
        ("dev", True, False),
        (None, True, False),
    ],
)
def test_servers_keep_their_weights_version_from_0_27_1_on_with_their_development_endpoints(
    version: str | None, development: bool, keeps: bool
) -> None:
    assert Identity("vllm", version=version, development=development).keeps_version is keeps


def test_what_one_of_two_servers_does_not_say_is_no_difference() -> None:
    told = Identity("vllm", "m", 4096, "raw_logprobs", "bfloat16")
    assert told.differences(Identity("vllm")) == Identity("vllm").differences(told) == []
    other = Identity("vllm", "m", 2048, "processed_logprobs", "bfloat16")
    assert told.differences(other) == [
        "has max_model_len 4096, others 2048",
        "has logprobs_mode 'raw_logprobs', others 'processed_logprobs'",
    ]
    assert told.differences(Identity("trl")) == ["speaks the 'vllm' dialect, others 'trl'"]


# Asked


def test_the_dialect_is_found_out_by_asking(vllm_fleet: Fleet, fleet: Fleet, make_pool: MakePool) -> None:
    new, old = make_pool(vllm_fleet(2)), make_pool(fleet(1))
    assert (new._pool.dialect.name, new.model) == ("vllm", "sim-model")
    assert (old._pool.dialect.name, old.model) == ("trl", None)
    identities = {backend.identity for backend in new._pool._dispatcher.backends.values()}
    assert identities == {
        Identity("vllm", "sim-model", 4096, "processed_logprobs", "bfloat16", "control", "0.31.0", 256, True)
    }


def test_a_server_that_is_neither_is_none_that_a_pool_can_use() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, text="nginx")

    with pytest.raises(BackendsUnreachableError, match="health probe answered 404"):
        VLLMClientPool("http://a:8000", config=quick(), transport=httpx.MockTransport(answer))


DIFFERENCES = [
    ({"dialect": "trl"}, "'trl' dialect"),
    ({"model": "other"}, "has model 'other', others 'sim-model'"),
    ({"max_model_len": 512}, "has max_model_len 512, others 4096"),
    ({"logprobs_mode": "raw_logprobs"}, "has logprobs_mode 'raw_logprobs', others 'processed_logprobs'"),
    ({"dtype": "float16"}, "has dtype 'float16', others 'bfloat16'"),
]
WHICH = [next(iter(traits)) for traits, _ in DIFFERENCES]


@pytest.mark.parametrize(("traits", "said"), DIFFERENCES, ids=WHICH)
def test_a_fleet_that_differs_is_refused_with_the_difference_named(
    pool_of: PoolOf, traits: dict[str, Any], said: str
) -> None:
    apps = Apps(a={}, b={}, c=traits)
    with pytest.raises(BackendMismatchError) as caught:
        pool_of(apps)
    # Who is asked first decides whose word counts, so either side may be named.
    assert len(caught.value.results) in (1, 2)
    name, _, rest = said.partition(", others ")
    for part in (name.removeprefix("has ").partition(" ")[0] if rest else "dialect", rest or "'trl'"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("traits", "said"), DIFFERENCES, ids=WHICH)
def test_a_server_that_differs_is_not_added(pool_of: PoolOf, traits: dict[str, Any], said: str) -> None:
    apps = Apps(a={}, b={})
    pool = pool_of(apps)
    apps.start("c", **traits)
    with pytest.raises(BackendMismatchError, match=said):
        pool.add_backend("http://c:8000")
    assert [backend.name for backend in pool.statistics().backends] == ["a:8000", "b:8000"]
    apps.start("c")
    assert pool.add_backend("http://c:8000") == "c:8000"


@pytest.mark.parametrize(("traits", "said"), DIFFERENCES, ids=WHICH)
def test_a_server_that_comes_back_as_another_takes_no_work(pool_of: PoolOf, traits: dict[str, Any], said: str) -> None:
    apps = Apps(a={}, b={})
    pool = pool_of(apps)

    def reason() -> str:
        return pool.statistics().backends[1].reason

    apps.down.add("b")
    eventually(lambda: "refused" in reason())
    apps.start("b", **traits)
    assert said in eventually(lambda: reason() if "refused" not in reason() else None)
    apps.requests.clear()
    assert len(pool.generate([[1], [2], [3]])["prompt_ids"]) == 3
    assert {request.url.host for request in apps.asked("/v1/completions")} == {"a"}
    assert pool.get_world_size() == 1, "it is no part of the update group either"
    apps.down.add("b")
    eventually(lambda: pool.statistics().backends[1].health == "down")
    apps.start("b")
    eventually(lambda: pool.statistics().backends[1].eligible)


def test_a_server_that_is_alone_may_come_back_as_another(pool_of: PoolOf) -> None:
    """There is nobody whom it would have to agree with, as when a whole fleet is started anew with another length."""
    apps = Apps(a={})
    pool = pool_of(apps)
    apps.down.add("a")
    eventually(lambda: not pool.statistics().backends[0].eligible)
    apps.start("a", max_model_len=64)
    eventually(lambda: pool.statistics().backends[0].eligible)
    with pytest.raises(ValueError, match="max_model_len=64"):
        pool.generate([[1] * 64])


def test_a_call_that_only_refused_servers_could_take_is_told_at_once(pool_of: PoolOf) -> None:
    apps = Apps(a={}, b={})
    pool = pool_of(apps, backend_wait_seconds=60)
    apps.down.add("b")
    eventually(lambda: not pool.statistics().backends[1].eligible)
    apps.start("b", model="other")
    eventually(lambda: "has model" in pool.statistics().backends[1].reason)
    pool.remove_backend("a:8000")
    with pytest.raises(NoBackendAvailableError, match="has model 'other'"):
        pool.generate([[1]])


# API keys


def test_the_api_key_goes_along_as_bearer_and_shows_nowhere(pool_of: PoolOf, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "trl_pool")
    apps = Apps(a={"api_key": KEY}, b={"api_key": KEY})
    pool = pool_of(apps, api_key=KEY, backend_wait_seconds=0)
    assert len(pool.generate([[1], [2], [3]])["prompt_ids"]) == 3
    assert {request.headers["authorization"] for request in apps.requests} == {f"Bearer {KEY}"}
    shown = [repr(pool), repr(pool._pool), repr(pool._pool.config), str(pool.statistics())]
    apps.down.update("ab")
    with pytest.raises(Exception, match=r"could not be served|No backend") as caught:
        pool.generate([[1]])
    shown += [str(caught.value), repr(caught.value), caplog.text]
    assert not any(KEY in text for text in shown)


def test_the_api_key_may_come_from_the_environment(pool_of: PoolOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKENDS", "http://a:8000")
    monkeypatch.setenv("BACKEND_API_KEY", KEY)
    with VLLMClientPool(transport=Apps(a={"api_key": KEY})) as pool:
        assert pool.model == "sim-model"
        assert KEY not in repr(pool._pool.config)


@pytest.mark.parametrize("key", [None, "sk-of-somebody-else"])
def test_a_missing_or_wrong_api_key_is_named_with_what_to_set(
    pool_of: PoolOf, key: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BackendsUnreachableError, match=r"api_key= or BACKEND_API_KEY") as caught:
        pool_of(Apps(a={"api_key": KEY}), api_key=key)
    assert str(key) not in str(caught.value) + caplog.text


# Gateways


def test_a_gateways_address_stands_for_the_backends_behind_it(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    sims = vllm_fleet(3)
    with closing(Gateway(sims[:2])) as gateway:
        pool = make_pool([gateway.url, sims[2]])
        assert [b.url for b in pool.statistics().backends] == [sims[2].url, sims[0].url, sims[1].url]
    # The gateway is gone; the servers are spoken to directly.
    assert len(pool.generate([f"prompt {i}" for i in range(6)])["prompt_ids"]) == 6
    assert [b.prompts for b in pool.statistics().backends] == [2, 2, 2]


def test_a_gateway_and_one_of_its_backends_are_that_backend_once(fleet: Fleet, make_pool: MakePool) -> None:
    sims = fleet(2)
    with closing(Gateway(sims)) as gateway:
        pool = make_pool([sims[1], gateway.url])
        assert sorted(b.url for b in pool.statistics().backends) == sorted(sim.url for sim in sims)


def test_a_gateway_is_no_backend_that_can_be_added(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    sims = vllm_fleet(2)
    pool = make_pool(sims[:1])
    with (
        closing(Gateway(sims[1:])) as gateway,
        pytest.raises(BackendMismatchError, match="is a gateway, not a server"),
    ):
        pool.add_backend(gateway.url)


def test_a_gateway_that_does_not_tell_its_backends_is_an_error() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health/":
            return httpx.Response(200, headers={"x-trl-pool": "gateway"})
        return httpx.Response(404, json={"detail": "Not Found"})

    with pytest.raises(BackendsUnreachableError, match="is a gateway and did not tell its backends"):
        VLLMClientPool("http://a:8000", config=quick(), transport=httpx.MockTransport(answer))
