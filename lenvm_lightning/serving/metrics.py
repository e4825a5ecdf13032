"""What the server tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .engine_loop import EngineLoop

_LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class ServerMetrics:
    """Counters of one server.

    Args:
        loop: of its engine.
    """

    def __init__(self, loop: EngineLoop) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "lenvm_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=self._registry
        )
        self.first_token = Histogram(
            "lenvm_first_token_seconds", "From request to first token.", buckets=_SECONDS, registry=self._registry
        )
        self.written = Histogram(
            "lenvm_completion_tokens", "Tokens of completions that ended.", buckets=_LENGTHS, registry=self._registry
        )
        self.expected = Histogram(
            "lenvm_expected_tokens", "Tokens that were expected of them.", buckets=_LENGTHS, registry=self._registry
        )
        self.error = Histogram(
            "lenvm_expected_error_tokens",
            "Absolute difference of expected and written tokens, of completions that ended unguided.",
            buckets=_LENGTHS,
            registry=self._registry,
        )
        under_way = Gauge("lenvm_completions", "Completions under way and waiting.", registry=self._registry)
        under_way.set_function(lambda: loop.completions)
        tokens = Gauge("lenvm_tokens_written", "Tokens written since the start.", registry=self._registry)
        tokens.set_function(lambda: loop.tokens_written)

    def ended(self, tokens: int, expected: float | None, comparable: bool) -> None:
        """Count a completion that ended; comparable = nobody controlled its length or truncated it."""
        self.written.observe(tokens)
        if expected is not None:
            self.expected.observe(expected)
            if comparable:
                self.error.observe(abs(expected - tokens))

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)
