"""Conversations come back to the server that has their beginning in its cache, without saying who they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import eventually, quick
from vllm_sims import Apps, Walk

from trl_pool import VLLMClientPool
from trl_pool.sim import SimProcess

Fleet = Callable[..., list[SimProcess]]
MakePool = Callable[..., VLLMClientPool]

SYSTEM = {"role": "system", "content": "You are a helpful assistant that calls tools. " * 20}
COUNT = 12


class Conversation:
    """One that goes on, turn by turn, behind a long system prompt that all of them share."""

    def __init__(self, number: int) -> None:
        self.messages = [SYSTEM, {"role": "user", "content": f"This is conversation {number}. " * 15}]

    def answered(self, ids: list[int]) -> None:
        self.messages += [
            {"role": "assistant", "content": f"An answer of {len(ids)} tokens. " * 6},
            {"role": "user", "content": "And then? " * 15},
        ]


def together(pool: VLLMClientPool, conversations: list[Conversation]) -> list[str | None]:
    """A turn of all in one call; who served each."""
    answer = pool.chat([one.messages for one in conversations], max_tokens=4)
    for one, ids in zip(conversations, answer["completion_ids"], strict=True):
        one.answered(ids)
    report = pool.last_report
    assert report is not None
    return [prompt.backend for prompt in report.prompts]


def apart(pool: VLLMClientPool, conversations: list[Conversation]) -> list[str | None]:
    """A turn of each in a call of its own."""
    return [together(pool, [one])[0] for one in conversations]


def begun(pool: VLLMClientPool) -> tuple[list[Conversation], list[str | None]]:
    """Conversations after their first turn, spread over all servers, and where they are."""
    conversations = [Conversation(i) for i in range(COUNT)]
    places = together(pool, conversations)
    assert len(set(places)) == 3
    return conversations, places


@pytest.mark.parametrize("turn", [together, apart], ids=["together", "apart"])
def test_each_conversation_stays_where_it_is_though_all_begin_alike(
    vllm_fleet: Fleet, make_pool: MakePool, turn: Callable[..., list[str | None]]
) -> None:
    pool = make_pool(vllm_fleet(3, first_weights=False))
    conversations, places = begun(pool)
    for _ in range(3):
        assert turn(pool, conversations) == places


@pytest.mark.parametrize("turn", [together, apart], ids=["together", "apart"])
def test_without_a_memory_they_go_where_their_first_characters_say(
    vllm_fleet: Fleet, make_pool: MakePool, turn: Callable[..., list[str | None]]
) -> None:
    pool = make_pool(vllm_fleet(3, first_weights=False), prefix_memory=0)
    conversations, places = begun(pool)
    conversations.reverse()  # so that nothing but its beginning leads a conversation back
    places.reverse()
    assert turn(pool, conversations) != places
    if turn is apart:
        assert len(set(turn(pool, conversations))) == 1


def test_the_order_of_a_batch_makes_no_difference_to_where_its_prompts_are_at_home(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    pool = make_pool(vllm_fleet(3, first_weights=False))
    conversations, places = begun(pool)
    conversations.reverse()
    assert together(pool, conversations) == places[::-1]


def test_token_ids_come_back_as_conversations_do(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    pool = make_pool(vllm_fleet(3, first_weights=False))
    prompts = [[7] * 400 + [number] * 200 for number in range(COUNT)]

    def turn() -> list[str | None]:
        answer = pool.generate(prompts, max_tokens=4)
        for prompt, ids in zip(prompts, answer["completion_ids"], strict=True):
            prompt += [*ids, *[9] * 100]
        assert pool.last_report is not None
        return [prompt.backend for prompt in pool.last_report.prompts]

    places = turn()
    prompts.reverse()
    assert turn() == places[::-1]


def test_servers_find_more_in_their_caches() -> None:
    def hits(**settings: Any) -> float:
        names = ("one", "two", "three")
        apps = Apps(**{name: {} for name in names})
        with VLLMClientPool(apps.urls, transport=apps, config=quick(**settings)) as pool:
            conversations = [Conversation(i) for i in range(COUNT)]
            for _ in range(4):
                together(pool, conversations)
                conversations = conversations[1:] + conversations[:1]
        caches = [apps.apps[name].worker.prefix_cache for name in names]  # type: ignore[union-attr]
        return sum(cache.hits for cache in caches) / sum(cache.queries for cache in caches)

    remembered, forgotten = hits(), hits(prefix_memory=0)
    assert remembered > 0.7
    assert remembered > forgotten + 0.05


@pytest.mark.parametrize("what", ["an update", "a reset"])
def test_when_caches_are_emptied_nothing_is_remembered(vllm_fleet: Fleet, make_pool: MakePool, what: str) -> None:
    pool = make_pool(vllm_fleet(3, first_weights=False))
    pool.init_communicator()
    conversations, _ = begun(pool)
    if what == "an update":
        walk = Walk()
        pool.update_named_params(walk.metadata, iter(walk))
    else:
        pool.reset_prefix_cache()
    # All begin alike, and nobody has anything: to the first one's place they all go.
    assert len(set(apart(pool, conversations))) == 1


def test_a_server_that_was_restarted_has_nothing_and_the_others_what_they_had(
    vllm_fleet: Fleet, make_pool: MakePool
) -> None:
    sims = vllm_fleet(3)
    pool = make_pool(sims)
    conversations, places = begun(pool)
    home = apart(pool, [Conversation(100)])[0]  # where those go of whose beginning nobody has more than the others
    gone = next(sim for sim in sims if sim.url != home)
    gone.kill()
    eventually(lambda: not all(b.eligible for b in pool.statistics().backends))
    gone.restart()
    eventually(lambda: all(b.eligible for b in pool.statistics().backends))
    for one, place in zip(conversations, places, strict=True):
        (found,) = apart(pool, [one])
        assert (found == place) is (place != gone.url)


def test_a_session_stays_in_its_own_place_whatever_is_remembered(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    pool = make_pool(vllm_fleet(3, first_weights=False))
    conversations, _ = begun(pool)
    found = []
    for one in conversations:
        pool.chat([one.messages], max_tokens=4, session_id="the same")
        assert pool.last_report is not None
        found.append(pool.last_report.prompts[0].backend)
    assert len(set(found)) == 1


def test_whoever_took_a_prompt_over_is_remembered_for_it(vllm_fleet: Fleet, make_pool: MakePool) -> None:
    sims = vllm_fleet(3, first_weights=False)
    pool = make_pool(sims)
    conversations = [Conversation(i) for i in range(COUNT)]
    sims[0].faults("status", status=503, endpoints=["chat_completions"])
    places = together(pool, conversations)
    assert sims[0].url not in places
    sims[0].clear_faults()
    assert apart(pool, conversations) == places
