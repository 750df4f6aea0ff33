#!/usr/bin/env bash
# xformers 0.0.35: no call of PagedBlockDiagonalGappyKeysMask.from_seqlens can succeed.
#
# The mask of a paged cache in which each sequence begins somewhere in its own pages: one start and one length per sequence. The method first
# asks for as many starts as lengths; then the class that it hands them to asks for one start more than lengths, as its unpaged sibling does
# (whose last start is the end of the storage). With n starts the second check raises, with n + 1 the first. So does the causal variant.
# The fields can be filled by hand: PagedBlockDiagonalGappyKeysMask(q_seqinfo, k_seqinfo, block_tables, page_size).
#
#   PagedBlockDiagonalGappyKeysMask: 2 starts ValueError, 3 starts AssertionError
#   PagedBlockDiagonalCausalWithOffsetGappyKeysMask: 2 starts ValueError, 3 starts AssertionError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.10.0 numpy==2.2.6 xformers==0.0.35
cat > "$folder/program.py" <<'PY'
import torch
from xformers.ops.fmha import attn_bias

table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
for name in ("PagedBlockDiagonalGappyKeysMask", "PagedBlockDiagonalCausalWithOffsetGappyKeysMask"):
    outcomes = []
    for starts in ([0, 0], [0, 0, 0]):
        try:
            getattr(attn_bias, name).from_seqlens([2, 3], starts, [4, 5], table, 4)
            outcome = "a mask"
        except (AssertionError, ValueError) as error:
            outcome = type(error).__name__
        outcomes.append(f"{len(starts)} starts {outcome}")
    print(f"{name}: {', '.join(outcomes)}")
PY
seen=$("$folder/venv/bin/python" "$folder/program.py" 2> /dev/null)
echo "$seen"
[ "$seen" = "PagedBlockDiagonalGappyKeysMask: 2 starts ValueError, 3 starts AssertionError
PagedBlockDiagonalCausalWithOffsetGappyKeysMask: 2 starts ValueError, 3 starts AssertionError" ]
