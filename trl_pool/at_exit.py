"""Last calls of a process that ends: without the event loop, which cannot even resolve names any more."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import requests

from .fleet import USER_AGENT

logger = logging.getLogger(__name__)


def post_all(urls: Sequence[str], *, seconds: float) -> None:
    """Posts to every URL at once with `requests` and returns after `seconds` at the latest, whatever they answer.

    Args:
        urls (`Sequence[str]`): Where to.
        seconds (`float`): Longest time for all together.
    """
    deadline = time.monotonic() + seconds

    def post(url: str) -> None:
        try:
            with requests.Session() as session:
                session.trust_env = False
                left = max(0.1, deadline - time.monotonic())
                session.post(url, timeout=left, headers={"user-agent": USER_AGENT})
        except requests.RequestException as error:
            logger.debug("At exit: %s: %s", url, error)

    threads = []
    for url in urls:
        thread = threading.Thread(target=post, args=(url,), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # newer Pythons start no thread this late
            post(url)
        else:
            threads.append(thread)
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
