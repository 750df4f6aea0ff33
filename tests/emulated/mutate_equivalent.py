"""Mutants of mutate.py that no test can tell from the kernels, and why."""

from __future__ import annotations

MORE_TILES = "only adds key tiles in which every key is hidden: time, no result"
MORE_MASKS = "masks a tile in which no key is hidden: time, no result"
EXISTING_ROWS = "asks whether rows exist where they do: time, no result"
NO_ROWS = "rows that do not exist are not written: time, no result"
ORDERED = "full tiles begin and end inside of the visible ones, so that both sides are equal"

_ROW_END = "const int32_t row_end = smaller(row_begin_ + kShape.rows, s_.seqlen_q);"
_DROPS = "if (kExtras == Extras::dropout && dropout_.threshold > 0) {"
_BLOCK_WITHOUT_ROWS = "if (row_tile * Tile::kShape.rows >= s.seqlen_q) return;"
_NEXT_KEYS = "if (tile > begin_) load_keys<true>(tile - 1);"
_MASKED_END = "const int32_t masked_end = tile >= all.end ? larger(all.end, begin_) : begin_;"
_WHOLE_TILES = "for (; tile >= all.begin && tile >= begin_; --tile) step<false>(tile);"

_END_TOKEN = "const int32_t end_token = smaller(token(row_begin_ + kRows - 1) + 1, s_.seqlen_q);"
_ROUNDS = "const int32_t rounds = larger((some.end - some.begin + kWarps - 1) / kWarps, 0);"
_PART_END = "end_ = smaller(some.end, tile + per_split * kWarps);"
_NO_TILES = "if (tile >= end_) return;"
_SOME_HIDDEN = "if (tile < whole_.begin || tile >= whole_.end) hide(scores, first_key);"
_NO_ROWS = "if (row_begin >= s.seqlen_q * int32_t(a.group.value)) return;"
_COLUMNS = "for (int32_t begin = 0; begin < p.head_dim_v; begin += 4 * kWarpThreads) {"
_PARTS = (
    "for (int32_t from = 0; from < kWarpThreads && i * kWarpThreads + from < a.splits; ++from) {"
)
_NO_WEIGHT = "if (weight == 0 || column >= p.head_dim_v) continue;"
_PAGED = "copy.template load<false>(shared, paged, tile * kKeys, s_.seqlen_k, int32_t(columns));"
_PADDED = "return {span.first + skipped, larger<Index>(span.length - skipped, 0)};"
_EXISTS = "const bool exists = kWhole || first_row + row_ + i * kRowStep < num_rows;"
_ACROSS = "const int across = smaller(pieces, kThreads);"
_TURN = "return p.rotary_cos ? Turn<T, kCount>(p, position, column) : Turn<T, kCount>();"

#: (file, line before, line after): reason
EQUIVALENT: dict[tuple[str, str, str], str] = (
    {
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
            (
                _WHOLE_TILES,
                _WHOLE_TILES.replace("<false>", "<true>"),
                MORE_MASKS,
            ),  # test_sass_sm80.py
            (
                _DROPS,
                _DROPS.replace("dropout_.threshold > 0", "true"),
                "a threshold of 0 keeps all",
            ),
            (_DROPS, _DROPS.replace(" > ", " >= "), "a threshold of 0 keeps all"),
            (_BLOCK_WITHOUT_ROWS, "if (false) return;", NO_ROWS),
            (_BLOCK_WITHOUT_ROWS, _BLOCK_WITHOUT_ROWS.replace(">=", ">"), NO_ROWS),
            (_NEXT_KEYS, _NEXT_KEYS.replace("<true>", "<false>"), EXISTING_ROWS),
        )
    }
    | {
        ("decode.cuh", before, after): reason
        for before, after, reason in (
            (_END_TOKEN, "const int32_t end_token = (s_.seqlen_q);", MORE_TILES),
            (
                _END_TOKEN,
                "const int32_t end_token = (token(row_begin_ + kRows - 1) + 1);",
                MORE_TILES,
            ),
            (_PART_END, "end_ = (tile + per_split * kWarps);", MORE_TILES),
            (
                _ROUNDS,
                "const int32_t rounds = ((some.end - some.begin + kWarps - 1) / kWarps);",
                "without it an empty range stays empty as well",
            ),
            (_SOME_HIDDEN, "if (true) hide(scores, first_key);", MORE_MASKS),
            (_SOME_HIDDEN, _SOME_HIDDEN.replace(" < ", " <= "), MORE_MASKS),
            (
                _NO_ROWS,
                "if (false) return;",
                "rows that do not exist are not written: time, no result",
            ),
            (_NO_ROWS, _NO_ROWS.replace(">=", ">"), NO_ROWS),
            (_COLUMNS, _COLUMNS.replace(" < ", " <= "), "no column is left: time, no result"),
            (
                _NO_WEIGHT,
                _NO_WEIGHT.replace("weight == 0", "false"),
                "parts without keys hold zeros",
            ),
            (
                _NO_WEIGHT,
                _NO_WEIGHT.replace("column >=", "column >"),
                "reads four numbers more and drops them; behind part_out lies part_lse",
            ),
            (
                _PARTS,
                _PARTS.replace("i * kWarpThreads + from < a.splits", "true"),
                "parts beyond the last have no weight and are left out",
            ),
            (_PARTS, _PARTS.replace("from < a.splits", "from <= a.splits"), "the same"),
            (_NO_TILES, "if (false) return;", "the loop behind it has no pass either"),
            (_NO_TILES, "if (tile > end_) return;", "the loop behind it has no pass either"),
            (
                _PAGED,
                _PAGED.replace("<false>", "<true>"),
                "behind the last row, KeyRows reads it again; these keys are hidden",
            ),
        )
    }
    | {
        ("lengths.h", _PADDED, "return {span.first + skipped, (span.length - skipped)};"): (
            "with a negative length no key is visible either"
        ),
        ("tile_copy.cuh", _EXISTS, _EXISTS.replace("kWhole", "false")): (
            "asks whether rows exist where they do: time, no result"
        ),
        ("kvcache_append.cuh", _ACROSS, "const int across = (kThreads);"): (
            "threads beyond the last piece have nothing to do: time, no result"
        ),
        ("kvcache_append.cuh", _TURN, _TURN.replace("p.rotary_cos ?", "true ?")): (
            "without tables rotary_dim is 0, and no column is before it"
        ),
    }
)
