"""What generation keeps between tokens: key/value caches, and CUDA graphs of a decoding step."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
from torch import Tensor

_LOGGER = logging.getLogger("anyflash")


@dataclass
class InferenceParams:
    """Where a batch stands in its generation; models hand it down to their layers.

    Args:
        max_seqlen: tokens that a cache has room for.
        max_batch_size: sequences that it has room for.
        seqlen_offset: tokens of each sequence that are in the cache.
        batch_size_offset: the first sequence of the cache that the batch uses.
        key_value_memory_dict: layer_idx -> cache (batch, seqlen, 2, heads_k, head_dim).
        lengths_per_sample: (max_batch_size,) int32, in place of seqlen_offset, where sequences
            differ in length.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Back to an empty cache; the memory stays."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def allocate_inference_cache(
    max_batch_size: int,
    max_seqlen: int,
    nheads: int,
    headdim: int,
    layers: int | Sequence[int],
    device: Any,
    dtype: torch.dtype = torch.float16,
) -> dict[int, Tensor]:
    """An uninitialised cache (max_batch_size, max_seqlen, 2, nheads, headdim) for each layer;
    layers: their number, or their indices."""
    size = (max_batch_size, max_seqlen, 2, nheads, headdim)
    indices = range(layers) if isinstance(layers, int) else layers
    return {i: torch.empty(size, device=device, dtype=dtype) for i in indices}


@dataclass
class DecodingCGCache:
    """The caches of a model and its captured decoding steps; (batch, seqlen) -> callable."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callables: dict = field(default_factory=dict)
    mempool: Any = None
    inference_params: Any = None  # InferenceParams, from the first update on
    run: Callable[[Tensor, Tensor, int], Tensor] | None = None


def _allocate(
    model: Any, batch_size: int, max_seqlen: int, tensor_parallel: int, dtype: Any, device: Any
) -> dict[int, Tensor]:
    if hasattr(model, "allocate_inference_cache"):
        return model.allocate_inference_cache(batch_size, max_seqlen, dtype)
    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    own_heads, layers = heads // tensor_parallel, config.num_hidden_layers
    return allocate_inference_cache(
        batch_size, max_seqlen, own_heads, head_dim, layers, device, dtype
    )


@torch.inference_mode()
def update_graph_cache(
    model: Any,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: Iterable[int] = (1,),
    tensor_parallel: int = 1,
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """Makes the cache fit, and captures the decoding steps that it lacks.

    On devices without CUDA graphs the steps call the model, which is said once.

    Args:
        model: its caches come from allocate_inference_cache(batch_size, max_seqlen, dtype) where it
            has this, else from its config.
        cache: of an earlier call, which is changed; None: a new one.
        batch_size: sequences.
        seqlen_og: tokens of the prompt.
        max_seqlen: tokens that caches need room for.
        decoding_seqlens: how many tokens steps evaluate at once.
        tensor_parallel: processes that share the heads, for a model without
            allocate_inference_cache.
        dtype: of the caches; None: the weights'.
        n_warmups: calls of the model before a capture.
    """
    cache = DecodingCGCache() if cache is None else cache
    weight = next(iter(model.parameters()))
    device, dtype = weight.device, weight.dtype if dtype is None else dtype
    too_small = batch_size > cache.max_batch_size or max_seqlen > cache.max_seqlen
    if too_small or (device, dtype) != (cache.device, cache.dtype):
        vars(cache).update(vars(DecodingCGCache()))
        gc.collect()  # The old graphs and caches go before the new ones come.
        layers = _allocate(model, batch_size, max_seqlen, tensor_parallel, dtype, device)
        lengths = torch.tensor([seqlen_og] * batch_size, dtype=torch.int32, device=device)
        fresh = DecodingCGCache(
            batch_size,
            max_seqlen,
            device,
            dtype,
            mempool=torch.cuda.graph_pool_handle() if device.type == "cuda" else None,
            inference_params=InferenceParams(
                max_seqlen, batch_size, seqlen_og,
                key_value_memory_dict=layers, lengths_per_sample=lengths,
            ),
        )  # fmt: skip
        vars(cache).update(vars(fresh))
    for seqlen in decoding_seqlens:
        if (batch_size, seqlen) not in cache.callables:
            cache.callables[batch_size, seqlen] = capture_graph(
                model, cache.inference_params, batch_size, max_seqlen, seqlen,
                mempool=cache.mempool, n_warmups=n_warmups,
            )  # fmt: skip

    def run(input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        return cache.callables[tuple(input_ids.shape[:2])](input_ids, position_ids, seqlen)

    cache.run = run
    cache.inference_params.seqlen_offset = 0
    return cache


@functools.cache
def _say_without_graphs(device_type: str) -> None:
    _LOGGER.warning(
        "anyflash: decoding runs without CUDA graphs, because the model is on %s. "
        "To choose it yourself: cg=False. This is said once.",
        device_type,
    )


@contextmanager
def _cached_tokens(inference_params: InferenceParams, seqlen: int) -> Iterator[None]:
    """Says that each sequence has seqlen tokens in the cache; seqlen_offset is restored."""
    before = inference_params.seqlen_offset
    inference_params.seqlen_offset = seqlen
    if inference_params.lengths_per_sample is not None:
        inference_params.lengths_per_sample.fill_(seqlen)
    try:
        yield
    finally:
        inference_params.seqlen_offset = before


class _Recorded:
    """forward(input_ids, position_ids) as a CUDA graph, which has its own inputs and output."""

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor], Tensor],
        shape: tuple[int, int],
        device: torch.device,
        mempool: Any,
        n_warmups: int,
    ) -> None:
        self.inputs = torch.zeros((2, *shape), dtype=torch.long, device=device)
        _warm_up(lambda: forward(*self.inputs), n_warmups)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=mempool):
            self.output = forward(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()


def _warm_up(call: Callable[[], Any], times: int) -> None:
    """Calls on a stream apart, as CUDA graphs ask for, and waits for the end."""
    apart = torch.cuda.Stream()
    apart.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(apart):
        for _ in range(times):
            call()
    apart.synchronize()
    # NCCL may not mix captured and other launches that overlap on different processes.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.cuda.synchronize()


def capture_graph(
    model: Any,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """A decoding step of batch_size sequences and decoding_seqlen tokens as a CUDA graph.

    Args: as update_graph_cache; mempool: what graphs share.

    Returns:
        run(input_ids, position_ids, seqlen) -> logits (batch_size, decoding_seqlen, vocab_size),
        where seqlen counts the tokens in the cache. Without CUDA graphs it calls the model.
    """

    def forward(input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return model(
            input_ids,
            position_ids=position_ids,
            inference_params=inference_params,
            num_last_tokens=decoding_seqlen,
        ).logits

    device = next(iter(model.parameters())).device
    step: Callable[[Tensor, Tensor], Tensor] = forward
    if device.type != "cuda":
        _say_without_graphs(device.type)
    else:
        # A graph keeps what Python numbers were: the longest length they can be.
        with _cached_tokens(inference_params, max_seqlen - decoding_seqlen):
            shape = (batch_size, decoding_seqlen)
            step = _Recorded(forward, shape, device, mempool, n_warmups)

    def run(input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        with _cached_tokens(inference_params, seqlen):
            return step(input_ids, position_ids)

    return run
