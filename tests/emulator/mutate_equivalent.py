"""Mutants of mutate.py that no test can tell from the kernels, and why."""

from __future__ import annotations

MORE_TILES = "only adds key tiles in which every key is hidden: time, no result"
MORE_MASKS = "masks a tile in which no key is hidden: time, no result"
ORDERED = "full tiles begin and end inside of the visible ones, so that both sides are equal"

_ROW_END = "const int32_t row_end = smaller(row_begin_ + kShape.rows, s_.seqlen_q);"
_MASKED_END = "const int32_t masked_end = tile >= all.end ? larger(all.end, begin_) : begin_;"
_WHOLE_TILES = "for (; tile >= all.begin && tile >= begin_; --tile) step<false>(tile);"

#: (file, line before, line after): reason
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("forward.cuh", before, after): reason
    for before, after, reason in (
        (_ROW_END, "const int32_t row_end = (row_begin_ + kShape.rows);", MORE_TILES),
        (_ROW_END, "const int32_t row_end = (s_.seqlen_q);", MORE_TILES),
        (_MASKED_END, _MASKED_END.replace("tile >= all.end", "false"), MORE_MASKS),
        (_MASKED_END, _MASKED_END.replace(">=", ">"), MORE_MASKS),
        (_MASKED_END, _MASKED_END.replace("larger(all.end, begin_)", "(begin_)"), MORE_MASKS),
        (_MASKED_END, _MASKED_END.replace("larger(all.end, begin_)", "(all.end)"), ORDERED),
        (_WHOLE_TILES, _WHOLE_TILES.replace("tile >= all", "tile > all"), MORE_MASKS),
        (_WHOLE_TILES, _WHOLE_TILES.replace("tile >= begin_", "tile > begin_"), MORE_MASKS),
        (_WHOLE_TILES, _WHOLE_TILES.replace("tile >= begin_", "true"), ORDERED),
    )
}
