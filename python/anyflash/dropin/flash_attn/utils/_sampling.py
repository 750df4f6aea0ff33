"""From logits to tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Puts -inf in place of all but the top_k largest logits (..., vocab_size)."""
    smallest_kept = torch.topk(logits, top_k, dim=-1).values[..., -1:]
    logits.masked_fill_(logits < smallest_kept, float("-inf"))


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Puts -inf in place of the least likely logits (..., vocab_size), as many as have 1 - top_p of
    the probability. With top_p outside (0, 1) nothing happens."""
    if not 0.0 < top_p < 1.0:
        return
    ascending, order = torch.sort(logits, dim=-1)
    tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    logits.masked_fill_(tail.scatter(-1, order, tail), float("-inf"))


def _check_sampling(top_p: float, temperature: float) -> None:
    if top_p > 1.0:
        raise ValueError(f"top-p should be in (0, 1], or 0 for no limit, got {top_p}")
    if not temperature > 0.0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Draws one token per row, (batch,) int64.

    Args:
        logits: (batch, vocab_size).
        top_k: how many of the likeliest take part; 1: the likeliest, without drawing; 0: all.
        top_p: of these, the likeliest whose probabilities reach top_p; 0: all.
        temperature: what logits are divided by.

    Raises:
        ValueError: top_p above 1, or a temperature that is not positive.
    """
    if top_k == 1:
        return logits.argmax(dim=-1)
    _check_sampling(top_p, temperature)
    tokens = None
    if top_k > 0:
        logits, tokens = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1)
    logits = logits / temperature
    modify_logits_for_top_p_filtering(logits, top_p)
    drawn = torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)
    return (drawn if tokens is None else tokens.gather(-1, drawn)).squeeze(-1)


def sample_speculative(
    logits: Tensor,
    logits_draft: Tensor,
    tokens_draft: Tensor,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Keeps as many drafted tokens as the model agrees with, and draws one more.

    The tokens are distributed as the model's own (Leviathan et al., arXiv 2211.17192, algorithm 1).

    Args:
        logits: (batch, seqlen + 1, vocab_size), the model's.
        logits_draft: (batch, seqlen, vocab_size), those that tokens_draft were drawn from.
        tokens_draft: (batch, seqlen) int32 or int64.
        top_k, top_p, temperature: as in sample, of both models.

    Returns:
        tokens (batch, seqlen + 1), of which the first num_generated_tokens (batch,) int64, in
        [1, seqlen + 1], are the result.

    Raises:
        ValueError: shapes that do not fit together, or as sample.
    """
    batch, seqlen = tokens_draft.shape
    vocab_size = logits.shape[-1]
    expected = (batch, seqlen + 1, vocab_size), (batch, seqlen, vocab_size)
    if (tuple(logits.shape), tuple(logits_draft.shape)) != expected:
        raise ValueError(
            f"logits, logits_draft: expected {expected[0]} and {expected[1]} beside tokens_draft "
            f"{(batch, seqlen)}, got {tuple(logits.shape)} and {tuple(logits_draft.shape)}"
        )
    _check_sampling(top_p, temperature)

    def probabilities(scores: Tensor) -> Tensor:
        scores = scores / temperature
        if top_k > 0:
            modify_logits_for_top_k_filtering(scores, min(top_k, vocab_size))
        modify_logits_for_top_p_filtering(scores, top_p)
        return torch.softmax(scores, dim=-1)

    def of_draft(probs: Tensor) -> Tensor:
        return probs.gather(-1, tokens_draft.long().unsqueeze(-1)).squeeze(-1)

    probs, probs_draft = probabilities(logits), probabilities(logits_draft)
    chance = torch.rand(batch, seqlen, device=probs.device)
    accepted = chance * of_draft(probs_draft) <= of_draft(probs[:, :-1])
    kept = accepted.long().cumprod(dim=1).sum(dim=1)
    # What the draft had too little of; behind the last drafted token, all that the model wants.
    missing = torch.cat([(probs[:, :-1] - probs_draft).clamp(min=0.0), probs[:, -1:]], dim=1)
    drawn = torch.multinomial(missing[torch.arange(batch, device=kept.device), kept], num_samples=1)
    tokens = F.pad(tokens_draft, (0, 1))
    return tokens.scatter(1, kept.unsqueeze(1), drawn.to(tokens.dtype)), kept + 1
