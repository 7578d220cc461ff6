# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads off a server: docs/serving.md has the table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from softprompt_fast.serving.engine import Engine
from softprompt_fast.serving.requests import Stream

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_PREFIX = "softprompt_fast_"


class Metrics:
    """Counts what an engine does; a server has one.

    Args:
        engine: it reports its streams here from now on.
        base_name: the label of requests without a prompt.
    """

    def __init__(self, engine: Engine, base_name: str) -> None:
        self._engine, self._base_name = engine, base_name
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        labels = ["model"]
        self._requests = Counter(
            f"{_PREFIX}requests", "Requests (rows) that ended, by outcome.", [*labels, "outcome"], **options
        )
        self._prompt_tokens = Counter(f"{_PREFIX}prompt_tokens", "Own tokens that were given.", labels, **options)
        self._new_tokens = Counter(f"{_PREFIX}generation_tokens", "New tokens.", labels, **options)
        self._first = Histogram(
            f"{_PREFIX}time_to_first_token_seconds", "From submission.", buckets=_SECONDS, **options
        )
        self._each = Histogram(
            f"{_PREFIX}time_per_output_token_seconds",
            "Mean of a request's tokens after the first.",
            buckets=_TOKEN_SECONDS,
            **options,
        )
        self._whole = Histogram(f"{_PREFIX}request_seconds", "From submission to end.", buckets=_SECONDS, **options)
        self._responses = Counter(f"{_PREFIX}http_responses", "Answers, by status.", ["status"], **options)
        Gauge(f"{_PREFIX}requests_waiting", "Requests that wait.", **options).set_function(lambda: engine.num_waiting)
        Gauge(f"{_PREFIX}requests_running", "Rows in the batch.", **options).set_function(lambda: engine.num_running)
        self.registry.register(_Bank(engine))
        engine.on_finish = self._finished

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)

    def count_response(self, status: int) -> None:
        """Count an answer of HTTP."""
        self._responses.labels(str(status)).inc()

    def _finished(self, stream: Stream) -> None:
        model = stream.request.prompt or self._base_name
        self._requests.labels(model, stream.finish_reason).inc()
        self._prompt_tokens.labels(model).inc(len(stream.request.input_ids))
        self._new_tokens.labels(model).inc(stream.num_tokens)
        assert stream.finished is not None
        self._whole.observe(stream.finished - stream.submitted)
        if stream.first_token is not None:
            self._first.observe(stream.first_token - stream.submitted)
            if stream.num_tokens > 1:
                self._each.observe((stream.finished - stream.first_token) / (stream.num_tokens - 1))


class _Bank:
    """The bank's own numbers, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        for name, value in self._engine.bank_metrics().items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"{_PREFIX}bank_{name.removesuffix('_total')}", "See docs/prompt-bank.md.", value=value)
