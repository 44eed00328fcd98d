"""Prometheus metrics of a server: requests, queue, time to first token, tokens, batch fill."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from shoulders.serving.engine import Engine

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "shoulders_requests",
            "Requests by skill and status.",
            ["skill", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "shoulders_prompt_tokens", "Tokens of inputs.", ["skill"], registry=registry
        )
        self.new_tokens = Counter(
            "shoulders_new_tokens", "Generated tokens.", ["skill"], registry=registry
        )
        self.first_token = Histogram(
            "shoulders_first_token_seconds", "Time to the first piece of an answer.", ["skill"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "shoulders_request_seconds", "Time of whole requests.", ["skill"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._registry.register(_EngineState(engine))

    def failed(self, skill: str, status: int) -> None:
        """Count a request that got no answer; `skill` is empty where it asked none that is served.

        Strangers choose what they ask for: a label for each would fill the memory.
        """
        self.requests.labels(skill, str(status)).inc()

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineState(Collector):
    """Reads the engine when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> list[GaugeMetricFamily]:
        """Return the engine's present state."""
        engine = self._engine
        values = {
            "shoulders_jobs": ("Jobs that run or wait.", engine.jobs),
            "shoulders_running_rows": ("Rows that are being decoded.", engine.running),
            "shoulders_decoded_tokens": ("Tokens decoded since the start.", engine.tokens),
            "shoulders_batch_fill": ("Mean rows in a decode step.", engine.fill),
        }
        return [GaugeMetricFamily(name, text, value) for name, (text, value) in values.items()]
