"""ParallelMHA and the parallel embeddings: two gloo processes against one module with all weights.

The processes start once, run every case and return what they found; the tests read it.
"""

from __future__ import annotations

import traceback

import pytest
import torch
import torch.distributed as dist
from flash_attn.modules.embedding import (
    ColumnParallelEmbedding,
    GPT2Embeddings,
    ParallelGPT2Embeddings,
    VocabParallelEmbedding,
)
from flash_attn.modules.mha import MHA, ParallelMHA, get_alibi_slopes
from flash_attn.utils.generation import InferenceParams
from gloo import run_processes

WORLD = 2
BATCH, SEQLEN, HEAD_DIM, VOCABULARY, PLACES = 2, 6, 16, 20, 8

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


def _share(whole: torch.Tensor, rank: int, dim: int = 0) -> torch.Tensor:
    return whole.chunk(WORLD, dim)[rank]


def _shards(whole: MHA, part: ParallelMHA, rank: int) -> dict[str, torch.Tensor]:
    """What each parameter of part is of the whole, by reading the layout: query heads, then key
    heads, then value heads; whole groups in order."""
    group = whole.num_heads // whole.num_heads_kv
    counts = [whole.num_heads_kv // WORLD + (r < whole.num_heads_kv % WORLD) for r in range(WORLD)]
    first = sum(counts[:rank])
    k_heads = torch.arange(first, first + counts[rank])
    q_heads = torch.arange(first * group, (first + counts[rank]) * group)
    heads = torch.cat(
        [q_heads, whole.num_heads + k_heads, whole.num_heads + whole.num_heads_kv + k_heads]
    )

    def take(x, which, dim=0):
        return x.unflatten(dim, (-1, HEAD_DIM)).index_select(dim, which).flatten(dim, dim + 1)

    shards = {
        "Wqkv.weight": take(whole.Wqkv.weight, heads),
        "Wqkv.bias": take(whole.Wqkv.bias, heads),
        "out_proj.weight": take(whole.out_proj.weight, q_heads, 1),
    }
    if rank == 0:
        shards["out_proj.bias"] = whole.out_proj.bias
    assert (part.num_heads_per_rank, part.num_heads_kv_per_rank) == (len(q_heads), len(k_heads))
    return shards


def _pair(rank: int, sequence_parallel: bool, heads: int, **options) -> tuple[MHA, ParallelMHA]:
    torch.manual_seed(0)
    options = {"dtype": torch.float64, "causal": True, **options}
    whole = MHA(heads * HEAD_DIM, heads, **options)
    part = ParallelMHA(
        heads * HEAD_DIM, heads, dist.group.WORLD, sequence_parallel=sequence_parallel, **options
    )
    part.load_state_dict(_shards(whole, part, rank))
    torch.manual_seed(1)  # the processes have drawn differently many numbers
    return whole, part


def _attention(rank: int, sequence_parallel: bool, heads: int = 4, **options) -> None:
    whole, part = _pair(rank, sequence_parallel, heads, **options)
    x = torch.randn(BATCH, SEQLEN, heads * HEAD_DIM, dtype=torch.float64, requires_grad=True)
    expected = whole(x)
    dout = torch.randn_like(expected)
    (dx,) = torch.autograd.grad(expected, x, dout, retain_graph=True)
    wanted = torch.autograd.grad(expected, list(whole.parameters()), dout)
    twin = MHA(heads * HEAD_DIM, heads, **{"dtype": torch.float64, "causal": True, **options})
    for parameter, gradient in zip(twin.parameters(), wanted):
        parameter.data.copy_(gradient)
    own = x.detach()
    if sequence_parallel:
        own, expected, dx, dout = (_share(t.flatten(0, 1), rank) for t in (own, expected, dx, dout))
    own = own.clone().requires_grad_()
    got = part(own, seqlen=SEQLEN) if sequence_parallel else part(own)
    torch.testing.assert_close(got, expected)
    got.backward(dout)
    torch.testing.assert_close(own.grad, dx)
    gradients = {name: p.grad for name, p in part.named_parameters()}
    torch.testing.assert_close(gradients, _shards(twin, part, rank))


def _generation(rank: int, **options) -> None:
    whole, part = _pair(rank, False, 4, layer_idx=0, dtype=torch.float32, **options)
    x = torch.randn(BATCH, SEQLEN, 4 * HEAD_DIM)
    params = InferenceParams(max_seqlen=8, max_batch_size=BATCH)
    cache = part.allocate_inference_cache(BATCH, 8)
    assert cache.shape == (BATCH, 8, 2, whole.num_heads_kv // WORLD, HEAD_DIM)
    params.key_value_memory_dict[0] = cache
    outs = []
    with torch.no_grad():
        for step in x.split([4, 1, 1], dim=1):
            outs.append(part(step, inference_params=params))
            params.seqlen_offset += step.shape[1]
        torch.testing.assert_close(torch.cat(outs, dim=1), whole(x), atol=1e-5, rtol=1e-5)


def _slopes(rank: int) -> None:
    for heads in (3, 4, 5):
        part = ParallelMHA(
            heads * HEAD_DIM, heads, dist.group.WORLD, use_alibi=True, use_flash_attn=True
        )
        slopes = torch.tensor(get_alibi_slopes(heads))
        first = (heads + 1) // 2
        expected = slopes[:first] if rank == 0 else slopes[first:]
        assert torch.equal(part.inner_attn.alibi_slopes, expected), heads


def _embeddings(rank: int, sequence_parallel: bool, combine: bool) -> None:
    width = 8
    torch.manual_seed(0)
    whole = GPT2Embeddings(width, VOCABULARY, PLACES, dtype=torch.float64)
    part = ParallelGPT2Embeddings(
        width, VOCABULARY, PLACES, dist.group.WORLD, sequence_parallel=sequence_parallel,
        dtype=torch.float64,
    )  # fmt: skip
    part.load_state_dict(
        {
            "word_embeddings.weight": _share(whole.word_embeddings.weight, rank),
            "position_embeddings.weight": _share(whole.position_embeddings.weight, rank, 1),
        }
    )
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQLEN))
    ids[0, 0], ids[0, 1] = 0, VOCABULARY - 1
    before = ids.clone()
    expected = whole(ids)
    expected = expected.flatten(0, 1) if combine else expected
    dout = torch.randn_like(expected)
    expected.backward(dout)
    got = part(ids, combine_batch_seqlen_dim=combine)
    if sequence_parallel:
        expected, dout = _share(expected, rank), _share(dout, rank)
    torch.testing.assert_close(got, expected)
    got.backward(dout)
    words, places = whole.word_embeddings.weight.grad, whole.position_embeddings.weight.grad
    torch.testing.assert_close(part.word_embeddings.weight.grad, _share(words, rank))
    torch.testing.assert_close(part.position_embeddings.weight.grad, _share(places, rank, 1))
    assert torch.equal(ids, before)
    own = torch.arange(SEQLEN).flip(0)
    out = part(ids, own)
    whole_out = whole(ids, own)
    torch.testing.assert_close(out, _share(whole_out, rank) if sequence_parallel else whole_out)


def _refusals(rank: int) -> None:
    world = dist.group.WORLD
    table = VocabParallelEmbedding(VOCABULARY, 4, process_group=world)
    for wrong in (-1, VOCABULARY):
        with pytest.raises(IndexError):
            table(torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match=r"num_embeddings \(7\) must be divisible by world_size"):
        VocabParallelEmbedding(7, 4, process_group=world)
    with pytest.raises(ValueError, match=r"embedding_dim \(5\) must be divisible by world_size"):
        ColumnParallelEmbedding(8, 5, process_group=world)
    with pytest.raises(RuntimeError, match="does not support padding_idx: .* got 0"):
        VocabParallelEmbedding(8, 4, process_group=world, padding_idx=0)
    with pytest.raises(ValueError, match="expected at most 1 processes, one per key head, got 2"):
        ParallelMHA(32, 2, world, num_heads_kv=1)


CASES = {
    **{
        f"attention {options} sequence_parallel={sequence_parallel}": (
            _attention,
            {"sequence_parallel": sequence_parallel, **options},
        )
        for sequence_parallel in (True, False)
        for options in (
            {},
            {"use_flash_attn": True, "num_heads_kv": 2, "rotary_emb_dim": 16},
            {"use_flash_attn": True, "use_alibi": True, "checkpointing": True},
            {"heads": 3},
            {"heads": 6, "num_heads_kv": 3, "use_flash_attn": True, "window_size": (2, 0)},
        )
    },
    "generation": (_generation, {}),
    "generation with grouped queries": (
        _generation,
        {"use_flash_attn": True, "num_heads_kv": 2, "rotary_emb_dim": 16},
    ),
    "slopes": (_slopes, {}),
    **{
        f"embeddings sequence_parallel={s} combine={c}": (
            _embeddings,
            {"sequence_parallel": s, "combine": c},
        )
        for s in (True, False)
        for c in (True, False)
    },
    "refusals": (_refusals, {}),
}


def _worker(rank: int) -> dict[str, str]:
    found = {}
    for name, (case, options) in CASES.items():
        try:
            case(rank, **options)
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> list[dict[str, str]]:
    """Per process: case -> traceback."""
    return run_processes(_worker, tmp_path_factory.mktemp("processes"), count=WORLD)


@pytest.mark.parametrize("name", CASES)
def test_two_processes(name, failures):
    found = [process[name] for process in failures if name in process]
    assert not found, "\n".join(found)
