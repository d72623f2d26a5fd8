"""Scraping /metrics in a process of its own, which has to find this module by its name."""

import time
from dataclasses import dataclass, field

import httpx


@dataclass
class Scrapes:
    """What scraping ten times a second gave: seconds and the plugin's lines of each, and errors.

    `empty_seconds`: how long an empty answer of the same server took right before.
    """

    seconds: list[float] = field(default_factory=list)
    empty_seconds: list[float] = field(default_factory=list)
    pages: list[list[str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def scrape_often(url: str, seconds: float) -> Scrapes:
    """Ten times a second, in a process of its own: the clients must not slow down what is measured here."""
    scrapes = Scrapes()
    with httpx.Client(timeout=30) as client:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.perf_counter()
            try:
                client.get(f"{url}/ping").raise_for_status()
                started = time.perf_counter()
                answer = client.get(f"{url}/metrics")
                answer.raise_for_status()
            except httpx.HTTPError as error:
                scrapes.problems.append(repr(error))
                continue
            scrapes.seconds.append(time.perf_counter() - started)
            scrapes.empty_seconds.append(started - began)
            lines = answer.text.splitlines()
            scrapes.pages.append([line for line in lines if line.startswith("vllm_expert_prefetch_")])
            time.sleep(max(0.0, 0.1 - (time.perf_counter() - began)))
    return scrapes
