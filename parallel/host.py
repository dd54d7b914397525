"""Run Megatron-core 0.16.1 on CPU tensors and gloo where no CUDA device is present.

Megatron-core takes a CUDA device for granted: it asks ``torch.cuda`` for the current device, passes
``device="cuda"`` by name, keeps streams and events, and compares ``Tensor.type()`` with CUDA names.
``enable()`` answers each of these for the CPU; with a CUDA device it leaves torch and Megatron as
they are (but for one Megatron defect that also breaks GPU machines, see ``_define_missing_names``).

Every patch of torch or Megatron in this project is made here. ``PATCHED_NAMES`` lists the Megatron
names that the patches rest on; a test compares it with the installed version.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

MEGATRON_VERSION = "0.16.1"

# module -> names that a patch below replaces or defines, all read by Megatron-core 0.16.1.
PATCHED_NAMES = {
    "megatron.core.jit": ["disable_jit_fuser"],
    "megatron.core.tensor_parallel.random": ["_lazy_call"],
    "megatron.core.transformer.moe.token_dispatcher": ["maybe_move_tensor_to_cpu"],
    "megatron.core.tensor_parallel.mappings": [
        "_gather_along_first_dim",
        "_reduce_scatter_along_first_dim",
    ],
}

_enabled = False


def has_accelerator() -> bool:
    """Whether a CUDA device is present. The whole program asks this one question here."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device that this process trains on: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_accelerator() else _CPU


def backend() -> str:
    """The ``torch.distributed`` backend that matches ``device()``."""
    return "nccl" if has_accelerator() else "gloo"


def enable() -> None:
    """Make Megatron-core usable on this machine. Call before the first import of Megatron; safe to
    call again.

    Raises:
        RuntimeError: the installed Megatron-core is not the version that the patches were written
            for.
    """
    global _enabled
    if _enabled:
        return
    _check_megatron_version()
    if not has_accelerator():
        _silence_known_warnings()
        _patch_cuda_queries()
        _patch_cuda_random()
        _patch_streams()
        # Never left: the process has no accelerator for as long as it lives.
        _CudaMeansCpu().__enter__()
        _import_without_compiled_fusions()
        _patch_megatron_random()
        _patch_expert_exchange()
    _define_missing_names()
    _enabled = True


_CPU = torch.device("cpu")


def _check_megatron_version() -> None:
    from importlib.metadata import version

    found = version("megatron-core")
    if found != MEGATRON_VERSION:
        raise RuntimeError(
            f"megatron-core {found} is installed, but parallel/host.py patches {MEGATRON_VERSION}: "
            f"install megatron-core=={MEGATRON_VERSION}, or review PATCHED_NAMES for {found}"
        )


def _silence_known_warnings() -> None:
    """What Megatron and torch say on such a machine and no user can act on: optional packages
    that are absent, torch names that have another now, gradients it reads from pipeline tensors."""
    for message in (
        ".*(Apex|apex|Transformer Engine|transformer_engine).*",
        "`?torch.distributed.*is deprecated.*",
        # Of experts that are not tensor-parallel, beside dense parts that are.
        "`sequence_parallel` is set to `True`, but tensor model parallel size is 1.*",
        ".*it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS.*",
        "The .grad attribute of a Tensor that is not a leaf.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def as_it_is() -> contextlib.AbstractContextManager[None]:
    """Torch without the detour that ``enable()`` gives every call, for loops of many small ones
    that name no device. They may not reach Megatron's schedules or dispatchers."""
    return torch._C.DisableTorchFunction()


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites ``device="cuda"`` (schedules.py:596, moe_utils.py:998, clip_grads.py and others name
    it) and lets ``Tensor.type()`` answer the CUDA names that distrib_optimizer.py:361, :420, :582
    and optimizer.py:671, :690 compare with."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        elif func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _is_cuda(where: Any) -> bool:
    if isinstance(where, str):
        return where.startswith("cuda")
    return isinstance(where, torch.device) and where.type == "cuda"


def _patch_cuda_queries() -> None:
    """mappings.py, layers.py, p2p_communication.py and param_and_grad_buffer.py allocate on
    ``torch.cuda.current_device()``; the schedules and timers synchronise and empty caches."""
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.device_count = lambda: 1
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


class _CpuGenerators:
    """Stands for ``torch.cuda.default_generators``: every index is the CPU generator."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _patch_cuda_random() -> None:
    """tensor_parallel/random.py seeds, reads and sets the CUDA generator for its trackers.
    ``manual_seed`` goes to the generator and not to ``torch.manual_seed``, which calls back."""

    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.default_generator.set_state(state)

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_rng_state  # type: ignore[attr-defined]
        module.set_rng_state = set_rng_state  # type: ignore[attr-defined]
        module.manual_seed = torch.default_generator.manual_seed  # type: ignore[attr-defined]
    torch.cuda.default_generators = _CpuGenerators()  # type: ignore[assignment]


class _NoStream:
    """A stream or event on a device that has neither: work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self


def _patch_streams() -> None:
    """token_dispatcher.py:445, param_and_grad_buffer.py and the schedules order work by streams."""
    only_stream = _NoStream()
    torch.cuda.Stream = torch.cuda.Event = _NoStream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *args, **kwargs: only_stream  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]


def _define_missing_names() -> None:
    """moe_utils.py:1192 reads ``te_general_gemm`` but imports it only with Transformer Engine, so
    an FP32 router raises NameError on every machine without it, GPU or not."""
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def _patch_megatron_random() -> None:
    """random.py:116 queues the setting of a generator's state until CUDA is initialised, which
    never happens here: set it at once."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._lazy_call = lambda call, **kwargs: call()  # type: ignore[attr-defined]


def _patch_expert_exchange() -> None:
    """gloo takes all-to-all splits as Python lists only, and gathers tensors of one shape only."""
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _as_split_sizes  # type: ignore[attr-defined]

    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, reduce_scatter = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

    @functools.wraps(gather)
    def gather_along_first_dim(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *buffer: Any
    ) -> torch.Tensor:
        if output_split_sizes is None:
            return gather(input_, group, None, *buffer)
        return _gather_uneven(input_, group, list(output_split_sizes))

    @functools.wraps(reduce_scatter)
    def reduce_scatter_along_first_dim(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *buffer: Any
    ) -> torch.Tensor:
        if input_split_sizes is None:
            return reduce_scatter(input_, group, None, *buffer)
        return _reduce_scatter_uneven(input_, group, list(input_split_sizes))

    mappings._gather_along_first_dim = gather_along_first_dim  # type: ignore[attr-defined]
    mappings._reduce_scatter_along_first_dim = reduce_scatter_along_first_dim  # type: ignore[attr-defined]


class _SplitSizes(list):
    """A list of int for gloo that also answers ``tolist()``, which token_dispatcher.py:695 asks."""

    def tolist(self) -> list[int]:
        return list(self)


def _as_split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Stands for moe_utils.maybe_move_tensor_to_cpu, whose ``is_cuda`` guard leaves tensors where
    gloo wants lists of int (token_dispatcher.py:876)."""
    return _SplitSizes(tensor.tolist()) if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_uneven(local: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    """All-gather of [sizes[rank], ...] along dim 0, for expert tensor parallelism: pad, gather,
    cut."""
    padded = local.new_zeros(max(sizes), *local.shape[1:])
    padded[: local.shape[0]] = local
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def _reduce_scatter_uneven(full: torch.Tensor, group: Any, sizes: list[int]) -> torch.Tensor:
    """Sum over the group of [sum(sizes), ...], of which this rank keeps its own part."""
    total = full.clone()
    dist.all_reduce(total, group=group)
    return total.split(sizes)[dist.get_rank(group)].contiguous()


def _import_without_compiled_fusions() -> None:
    """jit.py decorates element-wise chains with ``torch.compile`` while Megatron is imported; on a
    CPU that costs minutes of C++ compilation for chains that take microseconds."""
    compile_ = torch.compile
    torch.compile = lambda function, **kwargs: function  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
    finally:
        torch.compile = compile_
