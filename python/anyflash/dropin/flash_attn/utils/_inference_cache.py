"""What generation keeps between tokens: key/value caches, and CUDA graphs of a decoding step."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Iterable, Sequence
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
    inference_params: InferenceParams | None = None
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
        # The old graphs and caches go before the new ones come.
        cache.callables, cache.mempool, cache.inference_params = {}, None, None
        gc.collect()
        cache.device, cache.dtype = device, dtype
        cache.max_batch_size, cache.max_seqlen = batch_size, max_seqlen
        cache.inference_params = InferenceParams(
            max_seqlen,
            batch_size,
            seqlen_offset=seqlen_og,
            key_value_memory_dict=_allocate(
                model, batch_size, max_seqlen, tensor_parallel, dtype, device
            ),
            lengths_per_sample=torch.full(
                (batch_size,), seqlen_og, dtype=torch.int32, device=device
            ),
        )
        if device.type == "cuda":
            cache.mempool = torch.cuda.graphs.graph_pool_handle()
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
    if device.type != "cuda":
        _say_without_graphs(device.type)
        return _direct_step(forward, inference_params)

    input_ids = torch.zeros((batch_size, decoding_seqlen), dtype=torch.long, device=device)
    position_ids = torch.zeros_like(input_ids)
    offset_before = inference_params.seqlen_offset
    # A graph keeps what Python numbers were: the longest length they can be.
    inference_params.seqlen_offset = max_seqlen - decoding_seqlen
    inference_params.lengths_per_sample.fill_(inference_params.seqlen_offset)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(n_warmups):
            forward(input_ids, position_ids)
        side.synchronize()
        # NCCL may not mix captured and other launches that overlap on different processes.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=mempool):
        logits = forward(input_ids, position_ids)
    inference_params.seqlen_offset = offset_before

    def run(new_input_ids: Tensor, new_position_ids: Tensor, seqlen: int) -> Tensor:
        inference_params.lengths_per_sample.fill_(seqlen)
        input_ids.copy_(new_input_ids)
        position_ids.copy_(new_position_ids)
        graph.replay()
        return logits.clone()

    return run


def _direct_step(
    forward: Callable[[Tensor, Tensor], Tensor], inference_params: InferenceParams
) -> Callable[[Tensor, Tensor, int], Tensor]:
    def run(input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        offset_before = inference_params.seqlen_offset
        inference_params.seqlen_offset = seqlen
        inference_params.lengths_per_sample.fill_(seqlen)
        try:
            return forward(input_ids, position_ids)
        finally:
            inference_params.seqlen_offset = offset_before

    return run
