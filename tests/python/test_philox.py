"""One definition of the dropout bits: in plain Python integers, and in both providers."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import run_python

import anyflash
from anyflash.testing import dropout_half, keep_mask, philox

pytestmark = pytest.mark.providers

# Counter, key -> output: the published known answers of Philox-4x32 with 7 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]

# (seed, offset): small, above 32 bits, negative as int64.
STATES = [(0, 0), (1234, 5), (2**40 + 7, 2**33 + 9), (-3, 2**31)]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    assert philox(counter, key) == output


def test_every_half_belongs_to_one_element():
    """Within a 16 x 16 tile no two elements share bits, and neighbouring tiles and heads differ."""
    places = list(itertools.product(range(2), range(32), range(32)))
    halves = [dropout_half(1234, 5, *place) for place in places]
    # 2048 draws of 16 bits: about 32 pairs agree by chance.
    assert len(halves) - len(set(halves)) < 100


def _dropped(shape, state, p, device, backend=None, **options):
    """The mask that attention drew: uniform weights over identity values show it in out."""
    batch, heads, seqlen_q, seqlen_k = shape
    q = torch.zeros(batch, seqlen_q, heads, 8, device=device)
    k = torch.zeros(batch, seqlen_k, heads, 8, device=device)
    v = torch.eye(seqlen_k, device=device)[None, :, None].expand(batch, -1, heads, -1).contiguous()
    out = anyflash.attention(
        q,
        k,
        v,
        dropout_p=p,
        rng_state=torch.tensor(state, device=device),
        backend=backend,
        **options,
    )
    return (out > 0).transpose(1, 2)


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_operator_draws_the_defined_bits(state, p, device):
    shape = (2, 3, 37, 50)
    expected = torch.stack([keep_mask(torch.tensor(state), p, b, 3, 37, 50) for b in range(2)])
    assert torch.equal(_dropped(shape, state, p, device).cpu(), expected)


def test_bits_do_not_depend_on_length_or_window(device):
    """An element's bits come from its own coordinates: a longer call begins with the same mask."""
    state = (77, 3)
    short = _dropped((1, 2, 20, 30), state, 0.4, device)
    long = _dropped((1, 2, 300, 200), state, 0.4, device)
    assert torch.equal(long[:, :, :20, :30], short)


def test_packed_coordinates_are_relative_to_the_sequence(device):
    state, lengths = torch.tensor([9, 1]), (21, 34)
    v = torch.cat([torch.eye(34)[:n] for n in lengths]).to(device)[:, None].contiguous()
    zeros = torch.zeros(sum(lengths), 1, 8, device=device)
    cu = torch.tensor([0, 21, 55], dtype=torch.int32, device=device)
    out = anyflash.attention(
        zeros,
        zeros,
        v,
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        max_seqlen_q=34,
        max_seqlen_k=34,
        dropout_p=0.3,
        rng_state=state.to(device),
    )
    for b, (begin, n) in enumerate(zip((0, 21), lengths)):
        mask = out[begin : begin + n, 0, :n].cpu() > 0
        assert torch.equal(mask, keep_mask(state, 0.3, b, 1, n, n)[0])


def test_share_of_dropped_elements(device):
    mask = _dropped((4, 4, 128, 128), (5, 6), 0.17, device)
    share = 1 - mask.double().mean().item()
    assert abs(share - 0.17) < 5 * (0.17 * 0.83 / mask.numel()) ** 0.5


def test_seed_offset_and_head_matter(device):
    masks = [
        _dropped((2, 2, 32, 32), s, 0.5, device) for s in ((1, 1), (2, 1), (1, 2), (1 + 2**32, 1))
    ]
    masks += [masks[0].flip(0), masks[0].flip(1)]
    for a, b in itertools.combinations(masks, 2):
        assert not torch.equal(a, b)


def test_both_providers_draw_the_same_bits(device):
    code = f"""
import torch, anyflash
import anyflash._loader
assert anyflash._loader.provider == "python"
q = torch.zeros(1, 40, 2, 8, device="{device}")
v = torch.eye(40, device="{device}")[None, :, None].expand(1, -1, 2, -1).contiguous()
state = torch.tensor([11, 12], device="{device}")
out = anyflash.attention(q, q, v, dropout_p=0.4, rng_state=state)
print("".join(str(int(x)) for x in (out > 0).transpose(1, 2).flatten()))
"""
    printed = run_python(code, ANYFLASH_PROVIDER="python").strip()
    mask = _dropped((1, 2, 40, 40), (11, 12), 0.4, device)
    assert printed == "".join(str(int(x)) for x in mask.flatten())


def test_forward_and_backward_draw_the_same_bits(device):
    """dv of a sum is the column sums of the dropped weights, which out shows too."""
    q = torch.zeros(1, 24, 1, 8, device=device)
    v = torch.eye(24, device=device)[None, :, None].contiguous().requires_grad_()
    out = anyflash.attention(q, q, v, dropout_p=0.5, rng_state=torch.tensor([3, 4], device=device))
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv[0, :, 0, 0], out[0, :, 0, :].sum(0).detach())


def test_torch_seed_makes_dropout_reproducible(device):
    q, k, v = (torch.randn(1, 32, 2, 16, device=device) for _ in range(3))
    torch.manual_seed(0)
    first = anyflash.attention(q, k, v, dropout_p=0.5)
    second = anyflash.attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    again = anyflash.attention(q, k, v, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
