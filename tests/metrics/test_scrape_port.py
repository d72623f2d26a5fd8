"""A worker's own scrape port."""

import gc
import socket

import httpx
import pytest
from counter_files import make_counters
from servers import free_port

from vllm_expert_prefetch.metrics.definitions import INDEX
from vllm_expert_prefetch.metrics.scrape_port import serve_counters


def scrape(port):
    return httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text


def test_it_shows_this_worker_and_no_other(tmp_path):
    mine, other = make_counters(tmp_path), make_counters(tmp_path, "engine0-rank1-000000", "1")
    mine.add(INDEX["evictions_total"], 3)
    port = free_port()
    serve_counters(mine, port)
    text = scrape(port)
    assert 'vllm_expert_prefetch_evictions_total{engine="0",model_name="a/model",rank="0"} 3.0' in text
    assert 'rank="1"' not in text
    assert other.path.exists()


def test_a_port_in_use_is_named_with_the_setting(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} .*metrics_port"):
            serve_counters(make_counters(tmp_path), port)


def test_it_ends_with_the_counters(tmp_path):
    counters, port = make_counters(tmp_path), free_port()
    serve_counters(counters, port)
    assert scrape(port)
    del counters
    gc.collect()
    with pytest.raises(httpx.TransportError):
        scrape(port)
