"""A small model with a tokenizer, in a checkpoint of weights alone, and a server for it in the
processes of a test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch.distributed as dist

from megatron_m1.checkpoint.weights_only import save_weights
from megatron_m1.config import ServeConfig, ServerConfig
from megatron_m1.data.tokenizer import train_bpe
from megatron_m1.inference.load import Loaded, load_model, load_tokenizer
from megatron_m1.model.build import build_chunks
from megatron_m1.model.transformer_config import transformer_config
from megatron_m1.serving.service import Service
from megatron_m1.serving.web import listening
from parallel.layout import Layout
from tests.training import small_run

MODEL = replace(small_run.MODEL, vocab_size=300, aux_loss_coef=0.0)
TOKENIZER = train_bpe(["the tokens of a small vocabulary"], 270)
LENGTH = 64


def write_weights(layout: Layout, seed: int, path: Path) -> None:
    layout.build_groups()
    chunks = build_chunks(MODEL, transformer_config(MODEL, layout), seed=seed)
    save_weights(chunks, MODEL, TOKENIZER, path)


def begin(layout: Layout, path: Path, **server: Any) -> tuple[ServeConfig, Loaded]:
    layout.build_groups()
    given = ServerConfig(
        **{"port": 0, "slots": 2, "prefill_tokens": 8, "max_length": LENGTH} | server
    )
    return ServeConfig(parallel=layout, server=given), load_model(path, layout, "fp32")


def serve(
    layout: Layout, path: Path, call: Callable[..., Any], *arguments: Any, **server: Any
) -> Any:
    """What ``call`` returns, which is given a client of the server and the arguments, and runs in a
    thread of the first process while all serve."""
    config, loaded = begin(layout, path, **server)
    stop = threading.Event()
    service = Service(config, loaded, load_tokenizer(None, config.eod, loaded), stop)
    if dist.get_rank() != 0:
        return service.run()
    with ExitStack() as stack:
        url = stack.enter_context(listening(config.server, service))
        threads = stack.enter_context(ThreadPoolExecutor(1))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        future = threads.submit(call, client, *arguments)
        future.add_done_callback(lambda _: stop.set())
        service.run()
        return future.result()


def complete(client: httpx.Client, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to requests that are made at the same time."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = list(threads.map(lambda b: client.post("/v1/completions", json=b), bodies))
    return [answer.json() | {"status": answer.status_code} for answer in answers]
