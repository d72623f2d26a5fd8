"""A real Prometheus beside a server, load on the server, and the queries of every dashboard and alert."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
sys.path[:0] = [str(DEPLOY)]

from monitoring.grafana import fill_in  # noqa: E402
from monitoring.series import series_in  # noqa: E402

START_SECONDS = 60
RATE_INTERVAL = "20s"


class MissingPrometheus(RuntimeError):
    """No prometheus here; the message says how to get one."""


@dataclass(frozen=True)
class Query:
    """One target of a panel, with every Grafana variable filled in."""

    dashboard: str
    panel: str
    legend: str
    unit: str
    expression: str


def dashboard_queries(instance: str) -> list[Query]:
    """Every target of every committed dashboard, for the server that Prometheus calls `instance`."""
    variables = {"model": ".*", "instance": instance, "rank": ".*", "a": instance, "b": instance, "datasource": ""}
    found = []
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                expression = fill_in(target["expr"], variables, RATE_INTERVAL)
                unit = panel["fieldConfig"]["defaults"]["unit"]
                found.append(Query(dashboard["uid"], panel["title"], target["legendFormat"], unit, expression))
    return found


def alert_rules() -> list[dict[str, Any]]:
    """The alerts of the committed rule file."""
    groups = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


@dataclass
class Prometheus:
    """A running Prometheus with the committed configuration, rules and alerts."""

    url: str

    def query(self, expression: str, seconds: float | None = None) -> list[dict[str, Any]]:
        """The samples now, or `seconds` after 1970. RuntimeError in Prometheus' words when it refuses."""
        when = {} if seconds is None else {"time": seconds}
        return self._get("query", query=expression, **when)["result"]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The series of a range query; times in seconds since 1970."""
        return self._get("query_range", query=expression, start=start, end=end, step=step)["result"]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule with its health and last error."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def up(self) -> bool:
        """Whether every target was scraped without an error, the last time."""
        targets = self._get("targets")["activeTargets"]
        return bool(targets) and all(target["health"] == "up" for target in targets)

    def series_without_data(self, alert: dict[str, Any], seconds: float | None = None) -> list[str]:
        """The series that the alert reads and that are not there; empty when it could fire.

        RuntimeError when Prometheus refuses its expression.
        """
        self.query(alert["expr"], seconds)
        return [name for name in sorted(series_in(alert["expr"])) if not self.query(name, seconds)]

    def _get(self, path: str, **parameters: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        if answer["status"] != "success":
            raise RuntimeError(f"Prometheus refuses {parameters}: {answer['error']}")
        return answer["data"]


@contextlib.contextmanager
def run_prometheus(
    targets: Sequence[str] = (), scrape_seconds: float = 1, targets_url: str | None = None
) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `targets` (host:port) and evaluates the committed rules; gone afterwards.

    With `targets_url` the targets are those that the address names, with the configuration of deploy/ray-serve.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise MissingPrometheus(
            "no prometheus in PATH: apt-get install prometheus (Debian, Ubuntu), or its own release"
        )
    with tempfile.TemporaryDirectory() as directory:
        config = _config(targets, scrape_seconds, targets_url)
        path = Path(directory) / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [program, f"--config.file={path}", f"--storage.tsdb.path={directory}/data"]
        with (Path(directory) / "log").open("w") as log:
            process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
        try:
            _wait_ready(f"http://{address}", process, Path(directory) / "log")
            yield Prometheus(f"http://{address}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def _config(targets: Sequence[str], scrape_seconds: float, targets_url: str | None) -> dict[str, Any]:
    """The committed configuration with other targets and shorter intervals."""
    folder = DEPLOY / ("ray-serve" if targets_url else "prometheus")
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    interval = f"{round(1000 * scrape_seconds)}ms"
    config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": "1s"}
    config["rule_files"] = [str((folder / name).resolve()) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    if targets_url:
        job["http_sd_configs"] = [{"url": targets_url, "refresh_interval": "1s"}]
    else:
        job["static_configs"] = [{"targets": list(targets)}]
    return config


def _wait_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/-/ready", timeout=2).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"prometheus did not start: {log.read_text()[-2000:]}")


@dataclass
class Load:
    """What `clients` threads asked a server for, and what they got."""

    requests: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)


@contextlib.contextmanager
def load(url: str, prompts: list[str], clients: int, tokens: int = 32) -> Iterator[Load]:
    """Completions from `clients` threads, without a pause, until the block is left and every request has ended."""
    result, lock, stop = Load(), threading.Lock(), threading.Event()
    # A connection for each request: the server closes those that wait for 5 s, on a busy machine just as they are used.
    limits = httpx.Limits(max_keepalive_connections=0)

    def ask(number: int) -> None:
        with httpx.Client(timeout=120, limits=limits) as client:
            while not stop.is_set():
                number += clients
                body = {"model": "demo", "prompt": prompts[number % len(prompts)], "max_tokens": tokens}
                try:
                    answer = client.post(f"{url}/v1/completions", json={**body, "temperature": 0, "ignore_eos": True})
                    answer.raise_for_status()
                    used = answer.json()["usage"]["completion_tokens"]
                except (httpx.HTTPError, KeyError) as error:
                    with lock:
                        result.errors.append(repr(error))
                    return
                with lock:
                    result.requests += 1
                    result.tokens += used

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield result
    finally:
        stop.set()
        for thread in threads:
            thread.join(150)


def remove_scheme(url: str) -> str:
    """http://host:port as Prometheus names it: host:port."""
    return url.split("//", 1)[1]


def has_prometheus() -> bool:
    """Whether the program is here."""
    return shutil.which("prometheus", path=os.environ.get("PATH")) is not None
