"""One vLLM engine in this process, fed lazily: the next prompts are made while earlier ones decode."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Generator, Iterable
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...schemas.errors import ConfigError, EngineLost, OutOfMemory
from ..io import bucket_clients

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput

log = logging.getLogger(__name__)

START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
"""The environment variable that tells vLLM how to start its processes: "fork", its default, or "spawn"."""

FORK_HANGS = (
    "a process that is forked from one that has used a bucket waits for ever, and `out` is in one; unset the "
    "variable, or set it to spawn"
)

_open: weakref.WeakSet[Any] = weakref.WeakSet()
_closed: list[Any] = []
"""vLLM's engine cores in this process: in use, and to be shut down together with the last of those."""


class Request(NamedTuple):
    """A prompt on its way into the engine.

    Attributes:
        key: returned with the answer.
        prompt: vLLM's TokensPrompt or EmbedsPrompt.
        params: vLLM's SamplingParams.
        num_bytes: memory the prompt holds while it is in flight.
    """

    key: Any
    prompt: Any
    params: SamplingParams
    num_bytes: int = 0


def _never_fork_from_a_bucket() -> None:
    """Have vLLM start new processes where one that is forked from this process would hang."""
    if bucket_clients.was_used():
        if os.environ.get(START_METHOD) == "fork":
            raise ConfigError(f"{START_METHOD}=fork: {FORK_HANGS}")
        os.environ[START_METHOD] = "spawn"


class Engine:
    """vLLM with a plain loop around it.

    Args:
        model: a checkpoint folder whose weights are safetensors.
        own_process: vLLM's scheduler and model in a process of their own; else in this one.
        arguments: vLLM's `EngineArgs`, such as `max_model_len` or `gpu_memory_utilization`.

    Raises:
        ValueError: as vLLM has it, for arguments that do not fit the model or the GPU.
        ConfigError: the environment asks for a fork, which would hang here.
    """

    def __init__(self, model: str | Path, own_process: bool = False, **arguments: Any):
        _never_fork_from_a_bucket()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if own_process else "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        settings = {
            "load_format": "safetensors",
            "trust_remote_code": False,
            "seed": 0,
            "disable_log_stats": False,  # else there is no prefix-cache count
            **arguments,
        }
        self._prefix_cache = Counter[str]()
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(model=str(model), **settings), stat_loggers=[_prefix_cache_into(self._prefix_cache)]
        )
        self._numbers = 0
        self._own_process = own_process
        if own_process:
            _wake_when_it_dies(self.engine.engine_core)
        else:
            _open.add(self.engine.engine_core)

    def run(
        self, requests: Iterable[Request], max_in_flight: int = 256, max_bytes: int = 1 << 62
    ) -> Generator[tuple[Any, CompletionOutput]]:
        """(key, answer) of every request, in the order in which they finish.

        Requests are drawn one at a time, and only while fewer than `max_in_flight` and less than `max_bytes`
        are inside (one request may be larger than that alone); so a generator that encodes images works as
        far ahead as the engine can use and no further. Closing this iterator early takes what is left out of
        the engine.

        Raises:
            EngineLost: the engine died; this object is of no more use.
            OutOfMemory: the engine ran out of memory.
        """
        source = iter(requests)
        inside: dict[str, Request] = {}
        more = True
        held = 0
        try:
            while more or inside:
                while more and len(inside) < max_in_flight and (held < max_bytes or not inside):
                    request = next(source, None)
                    if request is None:
                        more = False
                        break
                    self._numbers += 1
                    inside[str(self._numbers)] = request
                    held += request.num_bytes
                    with _translated():
                        self.engine.add_request(str(self._numbers), request.prompt, request.params)
                if not inside:
                    break
                with _translated():
                    outputs = self.engine.step()
                for output in outputs:
                    if output.finished:
                        request = inside.pop(output.request_id)
                        held -= request.num_bytes
                        yield request.key, output.outputs[0]  # pyright: ignore - no pooling here
        finally:
            if inside:
                self.engine.abort_request(list(inside), internal=False)

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer; None if the engine was started without."""
        return self.engine.get_tokenizer()

    def prefix_cache(self) -> tuple[int, int]:
        """(hits, queries) in tokens since the start."""
        return self._prefix_cache["hits"], self._prefix_cache["queries"]

    def close(self) -> None:
        """Stop the engine and free its memory.

        Of several engines in this process, all are stopped, and their memory is freed, when the last one is
        closed: vLLM's shutdown ends the process groups that they share.
        """
        core = self.engine.engine_core
        if self._own_process:
            core.shutdown()
        elif core in _open:
            _open.remove(core)
            _closed.append(core)
            while _closed and not _open:
                _closed.pop().shutdown()


def _prefix_cache_into(counts: Counter[str]) -> Any:
    """A stat logger of one engine: vLLM's `get_metrics` adds up, or forgets, those of one process."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class PrefixCache(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0):
            pass

        def log_engine_initialized(self) -> None:
            pass

        def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
            if scheduler_stats is not None:
                counts["hits"] += scheduler_stats.prefix_cache_stats.hits
                counts["queries"] += scheduler_stats.prefix_cache_stats.queries

    return PrefixCache


def _wake_when_it_dies(core: Any) -> None:
    """End every wait for an engine when its process ends.

    vLLM 0.32 notices that a process was killed, and refuses calls from then on; but who waits for output or
    for the answer to a call at that moment never gets an error.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    resources, outputs, calls = core.resources, core.outputs_queue, core.utility_results

    def watch() -> None:
        connection.wait(resources.engine_manager.sentinels())
        while not resources.engine_dead:  # vLLM's own monitor is about to say so; then no new wait begins
            time.sleep(0.01)
        outputs.put_nowait(EngineDeadError())
        for call in list(calls.values()):
            if not call.done():
                call.set_exception(EngineDeadError())

    threading.Thread(target=watch, name="engine-dies", daemon=True).start()


class _translated:  # noqa: N801 - a context manager
    """vLLM's and torch's errors as ours."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        import torch
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, torch.OutOfMemoryError):
            raise OutOfMemory(f"vLLM: {error}") from error
        if isinstance(error, EngineDeadError):
            raise EngineLost(f"vLLM: {error}") from error
