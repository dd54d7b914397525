"""How a run uses servers for its rollout; mounted as ``rollout.http``."""

from __future__ import annotations

from dataclasses import dataclass, field

SERVERS = ("megatron_m1", "vllm", "sglang", "transformers")
LOGPROBS = ("raw", "sampled")


@dataclass
class HttpConfig:
    """OpenAI-compatible servers that are given the policy's weights after each update.

    Attributes:
        server: what they are: megatron_m1 (``megatron_m1.serve``), vllm, sglang or transformers.
        urls: their addresses, without ``/v1``; requests are spread over them.
        model: the model's name there, for vllm and sglang; the others are asked for the weights by
            a name of their own for each version.
        key_variable: the environment variable that holds the key, where they want one.
        concurrency: requests at a time, over all of them.
        timeout: seconds that one answer, or loading weights, may take.
        attempts: how often a request is sent, to one server after another, before the run ends.
        backoff: seconds before the second attempt, twice as many before each further one.
        logprobs_are: what vllm or sglang tell: raw, of the model at temperature 1, or sampled, of
            the distribution that they draw from.
        folder: where weights are published, by the same path here and there; null is
            ``RUN_DIR/weights``.
        like: a folder with the files of tokenizer and generation that other servers than our own
            want beside the weights.
        max_length: the longest prompt with its response that those servers are told of.
    """

    server: str = "megatron_m1"
    urls: list[str] = field(default_factory=list)
    model: str | None = None
    key_variable: str | None = None
    concurrency: int = 64
    timeout: float = 600.0
    attempts: int = 5
    backoff: float = 1.0
    logprobs_are: str = "raw"
    folder: str | None = None
    like: str | None = None
    max_length: int = 32_768

    def problems(self) -> list[str]:
        """What cannot work, one sentence each."""
        found = [
            f"rollout.http.{name}={value} is not one of {', '.join(allowed)}"
            for name, value, allowed in (
                ("server", self.server, SERVERS),
                ("logprobs_are", self.logprobs_are, LOGPROBS),
            )
            if value not in allowed
        ]
        if not self.urls:
            found.append("rollout.http.urls=[] names no server: give [http://HOST:PORT]")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                found.append(f"rollout.http.urls={url} must begin with http:// or https://")
        for key in ("concurrency", "attempts", "max_length"):
            if getattr(self, key) < 1:
                found.append(f"rollout.http.{key}={getattr(self, key)} must be at least 1")
        if self.timeout <= 0:
            found.append(f"rollout.http.timeout={self.timeout} must be positive")
        if self.backoff < 0:
            found.append(f"rollout.http.backoff={self.backoff} must not be negative")
        if self.server in ("vllm", "sglang") and not self.model:
            found.append(
                f"rollout.http.model=null: rollout.http.server={self.server} is asked by the name "
                "that it serves the model under"
            )
        return found
