"""Generation of tokens with a key/value cache: greedy, sampled and speculative.

A model is called as ``model(input_ids, position_ids=, inference_params=, num_last_tokens=)`` and
returns an object with logits (batch, num_last_tokens, vocab_size).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._inference_cache import (  # noqa: F401  (clients import these from here)
    DecodingCGCache,
    InferenceParams,
    allocate_inference_cache,
    capture_graph,
    update_graph_cache,
)
from ._sampling import (  # noqa: F401
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
    sample_speculative,
)


@dataclass
class _DecoderOnlyOutput:
    """What generation returns where transformers is not in use."""

    sequences: Tensor
    scores: Any = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.sequences, self.scores))


def _output_class(name: str) -> type:
    """transformers' class where the program has imported transformers, else our own."""
    if sys.modules.get("transformers") is not None:
        import transformers.generation

        for known in (name, "GenerateDecoderOnlyOutput"):
            if hasattr(transformers.generation, known):
                return getattr(transformers.generation, known)
    return _DecoderOnlyOutput


def __getattr__(name: str) -> Any:
    if name in ("GreedySearchDecoderOnlyOutput", "SampleDecoderOnlyOutput"):
        return _output_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _output(sequences: Tensor, scores: Any, top_k: int) -> Any:
    name = "GreedySearchDecoderOnlyOutput" if top_k == 1 else "SampleDecoderOnlyOutput"
    return _output_class(name)(sequences=sequences, scores=scores)


def _now(device: torch.device, tensor_parallel: int) -> float:
    """Seconds, when all that was started on the device and in the group is done."""
    if tensor_parallel > 1:
        torch.distributed.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Decoder:
    """A model with its cache, which holds the first params.seqlen_offset tokens."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        max_length: int,
        vocab_size: int | None,
        tensor_parallel: int,
        cg: bool,
        decoding_seqlens: Iterable[int] = (1,),
    ) -> None:
        batch_size, seqlen = input_ids.shape
        if seqlen > max_length:
            raise ValueError(
                f"max_length: expected at least the {seqlen} tokens of input_ids, got {max_length}"
            )
        self.model = model
        self.vocab_size = vocab_size
        self.cache: Any = None
        if not cg:
            self.params = InferenceParams(max_seqlen=max_length, max_batch_size=batch_size)
            return
        model._decoding_cache = self.cache = update_graph_cache(
            model, getattr(model, "_decoding_cache", None), batch_size, seqlen, max_length,
            decoding_seqlens=decoding_seqlens, tensor_parallel=tensor_parallel,
        )  # fmt: skip
        self.params = self.cache.inference_params
        self.params.reset(max_length, batch_size)

    def logits(self, ids: Tensor, num_last_tokens: int = 1) -> Tensor:
        """(batch, num_last_tokens, vocab_size) at the end of ids, whose beginning is in the cache.
        Afterwards all of ids is."""
        offset, end = self.params.seqlen_offset, ids.shape[1]
        new, position_ids = ids[:, offset:], None
        if offset > 0:
            position_ids = torch.arange(offset, end, device=ids.device).repeat(ids.shape[0], 1)
        if offset > 0 and self.cache is not None:
            logits = self.cache.run(new, position_ids, offset)
        else:
            logits = self.model(
                new,
                position_ids=position_ids,
                inference_params=self.params,
                num_last_tokens=num_last_tokens,
            ).logits
        self.params.seqlen_offset = end
        return logits[:, -num_last_tokens:, : self.vocab_size]

    def forget(self, seqlen: int) -> None:
        """Keeps at most the first seqlen tokens."""
        self.params.seqlen_offset = min(self.params.seqlen_offset, seqlen)

    def difference(self, ids: Tensor, logits: Tensor) -> float:
        """Between logits at the end of ids, and what the model says without a cache."""
        whole = self.model(ids, num_last_tokens=logits.shape[1]).logits
        return float((whole[..., : self.vocab_size] - logits).abs().max())


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    tensor_parallel: int = 1,
    cg: bool = False,
    enable_timing: bool = False,
) -> Any:
    """Generates until each sequence has max_length tokens, or all end in the same step.

    Args:
        input_ids: (batch, seqlen) int64, prompts of one length.
        model: see the head of this file.
        max_length: tokens of the result, prompt included.
        top_k, top_p, temperature: as in sample.
        eos_token_id: when all sequences draw it, generation ends.
        teacher_outputs: (batch, any length): tokens to take in place of drawn ones.
        vocab_size: logits beyond are cut off; None: none are.
        tensor_parallel: processes that share the model.
        cg: decode with CUDA graphs (update_graph_cache).
        enable_timing: print the time.

    Returns:
        An object with sequences (batch, at most max_length) and scores, a tuple of the logits
        (batch, vocab_size) of each step: transformers' class if the program uses transformers.

    Raises:
        ValueError: a prompt longer than max_length, or as sample.
    """
    decoder = _Decoder(model, input_ids, max_length, vocab_size, tensor_parallel, cg)
    begin = _now(input_ids.device, tensor_parallel) if enable_timing else 0.0
    ids, scores = input_ids, []
    while True:
        scores.append(decoder.logits(ids)[:, -1])
        if teacher_outputs is not None and ids.shape[1] < teacher_outputs.shape[1]:
            tokens = teacher_outputs[:, ids.shape[1]]
        else:
            tokens = sample(scores[-1], top_k=top_k, top_p=top_p, temperature=temperature)
        ids = torch.cat([ids, tokens.unsqueeze(1)], dim=1)
        if ids.shape[1] >= max_length:
            break
        if eos_token_id is not None and bool((tokens == eos_token_id).all()):
            break
    if enable_timing:
        elapsed = _now(input_ids.device, tensor_parallel) - begin
        print(f"Generated in {1000 * elapsed:.0f} ms, prompt included")
    return _output(ids, tuple(scores), top_k)


@torch.inference_mode()
def decode_speculative(
    input_ids: Tensor,
    model: Any,
    model_draft: Any,
    max_length: int,
    speculative_lookahead: int = 3,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    tensor_parallel: int = 1,
    cg: bool = False,
    enable_timing: bool = False,
    debug: bool = False,
) -> Any:
    """Generates one sequence with a small model that drafts and a large one that checks.

    Args:
        input_ids: (1, seqlen) int64.
        model: see the head of this file.
        model_draft: likewise, with the same vocabulary.
        max_length: tokens of the result, prompt included.
        speculative_lookahead: tokens that are drafted before each check.
        top_k to enable_timing: as in decode; eos_token_id must be None.
        debug: print how far logits with and without caches are apart, and what is kept.

    Returns:
        As decode, with scores (1, generated tokens, vocab_size).

    Raises:
        ValueError: more than one sequence, an eos_token_id, one model twice with CUDA graphs, or as
            decode.
    """
    if input_ids.shape[0] != 1:
        raise ValueError(
            "Speculative decoding implementation only supports batch_size=1, "
            f"got {input_ids.shape[0]}"
        )
    if eos_token_id is not None:
        raise ValueError(
            f"Speculative decoding implementation doesn't support eos_token_id, got {eos_token_id}"
        )
    if cg and model is model_draft:
        raise ValueError("model_draft: expected another object than model with cg=True")
    common = (input_ids, max_length, vocab_size, tensor_parallel, cg)
    # A draft that was kept whole leaves two tokens that its own model has not seen.
    drafter = _Decoder(model_draft, *common, decoding_seqlens=(1, 2))
    checker = _Decoder(model, *common, decoding_seqlens=range(1, speculative_lookahead + 2))
    sampling: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    begin = _now(input_ids.device, tensor_parallel) if enable_timing else 0.0
    ids, scores = input_ids, []
    checks = drafted = kept = 0
    while True:
        seqlen = ids.shape[1]
        lookahead = max(0, min(speculative_lookahead, max_length - seqlen - 1))
        extended, draft_logits = ids, []
        for _ in range(lookahead):
            draft_logits.append(drafter.logits(extended)[:, -1])
            token = sample(draft_logits[-1], **sampling)
            extended = torch.cat([extended, token.unsqueeze(1)], dim=1)
        logits = checker.logits(extended, num_last_tokens=lookahead + 1)
        checks += 1
        drafted += lookahead
        if lookahead == 0:
            tokens, generated = sample(logits[:, -1], **sampling).unsqueeze(1), 1
        else:
            tokens, counts = sample_speculative(
                logits, torch.stack(draft_logits, dim=1), extended[:, seqlen:], **sampling
            )
            generated = int(counts[0])
        if debug:
            print(f"Difference without cache: {checker.difference(extended, logits)}")
            print(f"Tokens: {tokens.tolist()}, of which {generated} are kept")
        kept += generated - 1
        ids = torch.cat([ids, tokens[:, :generated]], dim=1)
        scores.append(logits[:, :generated])
        if ids.shape[1] >= max_length:
            break
        # The last token is not yet in a cache; behind it lie rejected ones.
        for decoder in (drafter, checker):
            decoder.forget(ids.shape[1] - 1)
    if enable_timing:
        elapsed = _now(input_ids.device, tensor_parallel) - begin
        print(f"Generated in {1000 * elapsed:.0f} ms, prompt included")
        print(f"The model was called {checks} times and kept {kept} of {drafted} drafted tokens")
    return _output(ids, torch.cat(scores, dim=1), top_k)


class GenerationMixin:
    """generate() for a model that decode can call."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Tensor]:
        """layer_idx -> cache; what CUDA graphs need of a model."""
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """decode() of this model; the sequences alone unless return_dict_in_generate."""
        output = decode(
            input_ids, self, max_length, top_k=top_k, top_p=top_p, temperature=temperature, **kwargs
        )
        if not return_dict_in_generate:
            return output.sequences
        if not output_scores:
            output.scores = None
        return output
