"""Mutants of mutate.py that no test can tell from the kernels, and why."""

from __future__ import annotations

MORE_TILES = "only adds key tiles in which every key is hidden: time, no result"
MORE_MASKS = "masks a tile in which no key is hidden: time, no result"
NO_KEYS = "of keys that do not exist nothing is written: time, no result"
NO_ROWS = "rows that do not exist are not written: time, no result"
ASKS_IN_VAIN = "asks whether rows exist where they do: time, no result"
KEEPS_ALL = "a threshold of 0 keeps all"
ADDS_ZERO = "a bias has an element there, to which zero is added"
ONLY_SHORTER = "keeps to the bias where lengths are above those of the call, as in no case"
SUM_IS_ZERO = "adds a sum to which nothing was added: time, no result"
STAYS_EMPTY = "without it an empty range stays empty as well"

_SPAN = "(tiles.end - tiles.begin)"
_FORWARD_END_TOKEN = "return smaller(token(b_.row_begin + kShape.rows - 1) + 1, s_.seqlen_q);"
_EACH = "const int32_t each = (larger(tiles.end - tiles.begin, 0) + a_.splits - 1) / a_.splits;"
_SOME_HIDDEN = "if (tile < whole_.begin || tile >= whole_.end) hide(scores, tile, first_key);"
_DROPS = "if (drops(kExtras) && a_.score.dropout_threshold > 0) {"
_BEHIND = "if (tile >= whole_.end) {"
_BEFORE = "if (tile < whole_.begin) {"
_QUERIES = "if (!ptx::kHasCpAsync) queries.finish(copy, query_tile());"
_HAS_ROWS = "if (!block.has_rows(a)) return;"

_OWN_DRAWS = "if (drops(kExtras) && p.rng_state) {  // without: what else only Extras::all has"
_SINK = "const float sink = p_.sinks && exists && !in_parts ? p_.sinks[query_head] : -infinity();"
_FACTOR = "drops(kExtras) ? result.inverse_sum * a_.score.keep_scale : result.inverse_sum;"
_LOAD_KEYS = "if (!kLast && ptx::kHasCpAsync) load_keys<true>(tile - 1);"
_FETCH_KEYS = "if (!kLast && !ptx::kHasCpAsync) load_keys<true>(tile - 1);"
_OWN_ROWS = (
    "const int32_t rows = s.index == p.batch ? 0 : s.seqlen_q;  // behind the last nothing is read"
)
_MERGED = "const bool merged = largest + lse * kLn2 < given - fabsf(given) * 0x1p-12f;"
_FAR_NUMBERS = "return {max, merged ? infinity() : lse, sink - lse};"
_OF_OTHERS = "only a log-sum-exp that has other keys in it gets there"
_LEAST_DIFFERENCE = "a logarithm of 2^100 is 100"
_OWN_ROWS_FAR = "const int32_t rows = s.index == p.batch ? 0 : s.seqlen_q;"
_FINISH_END = "const int32_t end = smaller(block.row_begin + kRowTile, s.seqlen_q);"

_ADDS_TERMS = "if (p_.alibi_slopes || (kAll && p_.bias)) {"
_ROWS_OF_TILE = "const int32_t end_row = smaller(b_.row_begin + kShape.rows, s_.seqlen_q);"
_QUERIES_MASK = "[&] { return mask_; }, tile < whole.begin || tile >= whole.end,"
_KEYS_MASK = (
    "scores, c_.head, corner, [&] { return mask(); }, tile < whole_.begin || tile >= whole_.end,"
)
_HAS_KEYS = (
    "__device__ __forceinline__ bool has_keys() const { return key_begin < sequence.seqlen_k; }"
)
_ROWS_LEFT = "return row_begin < sequence.seqlen_q * int32_t(a.group.value);"
_BIAS_ROWS = "const int32_t end_row = smaller(s.seqlen_q, int32_t(p.seqlen_q));"
_BIAS_KEYS = "const int32_t end_key = smaller(s.seqlen_k, int32_t(p.seqlen_k));"
_MASKED = "if (masked) hide(x, corner(), mask());"
_SOME_DROPPED = "if (a_.dropout_threshold > 0) {"
_KEPT = "const bool kept = __float_as_int(p) >= 0;"

_NO_WHOLE_TILES = "whole_ = {0, 0};  // there are keys to hide"
_KEYS_TO_HIDE = f"if (b_.key_begin + kKeys > s_.seqlen_k) {_NO_WHOLE_TILES}"

_DECODE_END_TOKEN = "return smaller(token(row_begin_ + kRows - 1) + 1, s_.seqlen_q);"
_UPDATE = "softmax_.template update<false>(scores, out_, a_.score.exponent);"
_SLOPE = (
    "slope[h] = token(row(h)) < s_.seqlen_q ? slopes[head(row(h))] * a_.score.inverse_unit : 0;"
)
_ANY_TOKEN = ("token(row(h)) < s_.seqlen_q", "true")
_ROUNDS = "const int32_t rounds = larger((tiles.end - tiles.begin + kWarps - 1) / kWarps, 0);"
_DECODE_SOME_HIDDEN = "if (tile < whole_.begin || tile >= whole_.end) hide(scores, first_key);"
_NO_TILES = "if (part_.begin >= part_.end) return;"
_COLUMNS = "for (int32_t begin = 0; begin < p.head_dim_v; begin += 4 * kWarpThreads) {"
_PARTS = (
    "for (int32_t from = 0; from < kWarpThreads && i * kWarpThreads + from < a.splits; ++from) {"
)
_NO_WEIGHT = "if (weight == 0 || column >= p.head_dim_v) continue;"
_PADDED = "return {span.first + skipped, larger<Index>(span.length - skipped, 0)};"
_FINITE_MAX = (
    "__device__ __forceinline__ float finite_max(float max) { return max == -infinity() ? 0.0f : "
    "max; }"
)
_DIFFERENCE = "return ptx::ex2(kAnySize ? (x - row_max) * scale : x * scale - subtrahend);"
_EXISTS = "const bool exists = kWhole || row_ + i * kRowStep < num_rows;"
_PIN = "if (i == 0) place.pin();"
_CHUNK = "const char* chunk = i == 0 ? place.chunk(0) : ptx::opaque(place.chunk(i * kRowStep));"
_ACROSS = "const int across = smaller(pieces, kThreads);"
_TURN = "return p.rotary_cos ? Turn<T, kCount>(p, position, column) : Turn<T, kCount>();"

_SERIES = "return fabsf(x) < 0.25f ? series : far;"
_TIMES = "if (a.factor != 1) map_scores(scores, [&](float x) { return x * a.factor; });"
_TANH = "if (kAnyCap && a.softcap == Softcap::tanh) {"
_LOWEST = "if (x < lowest && value > -infinity()) x = lowest;"
_TERM_ROWS = "const int32_t end_row = smaller(mask.seqlen_q, int32_t(p.seqlen_q));"
_TERM_KEYS = "const int32_t end_key = smaller(mask.seqlen_k, int32_t(p.seqlen_k));"

#: (file, line before, line after): reason
EQUIVALENT: dict[tuple[str, str, str], str] = (
    {
        ("forward.cuh", before, after): reason
        for before, after, reason in (
            (_FORWARD_END_TOKEN, "return (s_.seqlen_q);", MORE_TILES),
            (
                _FORWARD_END_TOKEN,
                "return (token(b_.row_begin + kShape.rows - 1) + 1);",
                MORE_TILES,
            ),
            (_EACH, _EACH.replace("larger(tiles.end - tiles.begin, 0)", _SPAN), STAYS_EMPTY),
            (_QUERIES, _QUERIES.replace("!ptx::kHasCpAsync", "true"), "waits twice"),
            (_SOME_HIDDEN, "if (true) hide(scores, tile, first_key);", MORE_MASKS),
            (_SOME_HIDDEN, _SOME_HIDDEN.replace(" < ", " <= "), MORE_MASKS),
            (_DROPS, "if (true) {", KEEPS_ALL),
            (_DROPS, _DROPS.replace("drops(kExtras)", "true"), KEEPS_ALL),
            (_DROPS, _DROPS.replace("a_.score.dropout_threshold > 0", "true"), KEEPS_ALL),
            (_DROPS, _DROPS.replace(" > ", " >= "), KEEPS_ALL),
            (_BEHIND, "if (true) {", MORE_MASKS),
            (_BEFORE, "if (true) {", MORE_MASKS),
            (_BEFORE, _BEFORE.replace(" < ", " <= "), MORE_MASKS),
            (_HAS_ROWS, "if (false) return;", NO_ROWS),
            ("if (modifies_scores(kExtras)) {", "if (true) {", "nobody asks for the terms"),
            (_OWN_DRAWS, _OWN_DRAWS.replace("drops(kExtras)", "true"), "nobody asks for them"),
            (_SINK, _SINK.replace("exists", "true"), "such a row has a head, and is not written"),
            (_FACTOR, _FACTOR.replace("drops(kExtras)", "true"), "without dropout it is 1"),
            (_LOAD_KEYS, _LOAD_KEYS.replace("ptx::kHasCpAsync", "true"), "fetches twice"),
            (_LOAD_KEYS, _LOAD_KEYS.replace("<true>", "<false>"), ASKS_IN_VAIN),
            (_FETCH_KEYS, _FETCH_KEYS.replace("<true>", "<false>"), ASKS_IN_VAIN),
        )
    }
    | {
        ("decode.cuh", before, after): reason
        for before, after, reason in (
            (_DECODE_END_TOKEN, "return (s_.seqlen_q);", MORE_TILES),
            (_DECODE_END_TOKEN, "return (token(row_begin_ + kRows - 1) + 1);", MORE_TILES),
            (
                _ROUNDS,
                "const int32_t rounds = ((tiles.end - tiles.begin + kWarps - 1) / kWarps);",
                STAYS_EMPTY,
            ),
            (_DECODE_SOME_HIDDEN, "if (true) hide(scores, first_key);", MORE_MASKS),
            (_DECODE_SOME_HIDDEN, _DECODE_SOME_HIDDEN.replace(" < ", " <= "), MORE_MASKS),
            (_NO_TILES, "if (false) return;", "the loop behind it has no pass either"),
            (_NO_TILES, _NO_TILES.replace(">=", ">"), "the loop behind it has no pass either"),
            (_HAS_ROWS, "if (false) return;", NO_ROWS),
            (
                "return {begin, smaller(begin + each, tiles.end)};",
                "return {begin, (begin + each)};",
                MORE_TILES,
            ),
            (_UPDATE, _UPDATE.replace("<false>", "<true>"), "also scores that there are not"),
            *(
                (_SLOPE, _SLOPE.replace(*change), NO_ROWS)
                for change in (_ANY_TOKEN, (" < ", " <= "))
            ),
        )
    }
    | {
        ("combine.cuh", before, after): reason
        for before, after, reason in (
            (_COLUMNS, _COLUMNS.replace(" < ", " <= "), "no column is left: time, no result"),
            (
                _NO_WEIGHT,
                _NO_WEIGHT.replace("weight == 0", "false"),
                "parts without keys hold zeros",
            ),
            (
                _NO_WEIGHT,
                _NO_WEIGHT.replace("column >=", "column >"),
                "reads four numbers more and drops them; behind part_out lie part_sums",
            ),
            (
                _PARTS,
                _PARTS.replace("i * kWarpThreads + from < a.splits", "true"),
                "parts beyond the last have no weight and are left out",
            ),
            (_PARTS, _PARTS.replace("from < a.splits", "from <= a.splits"), "the same"),
        )
    }
    | {
        ("scores.cuh", before, after): reason
        for before, after, reason in (
            (_SERIES, _SERIES.replace(" < ", " <= "), "both are right at 1/4"),
            (_TIMES, _TIMES.replace("a.factor != 1", "true"), "times 1: time, no result"),
            (_TANH, _TANH.replace("kAnyCap", "true"), "such calls take the kernels with all"),
            (_LOWEST, _LOWEST.replace(" < ", " <= "), "the same number"),
            ("if (p.alibi_slopes) {", "if (true) {", "a slope of 0 adds nothing"),
            (_TERM_ROWS, "const int32_t end_row = (int32_t(p.seqlen_q));", NO_ROWS),
            (_TERM_ROWS, "const int32_t end_row = (mask.seqlen_q);", ONLY_SHORTER),
            (_TERM_KEYS, "const int32_t end_key = (int32_t(p.seqlen_k));", "hidden afterwards"),
            (_TERM_KEYS, "const int32_t end_key = (mask.seqlen_k);", ONLY_SHORTER),
        )
    }
    | {
        ("lengths.h", _PADDED, "return {span.first + skipped, (span.length - skipped)};"): (
            "with a negative length no key is visible either"
        ),
        ("online_softmax.cuh", _FINITE_MAX, _FINITE_MAX.replace("max == -infinity()", "false")): (
            "a row without keys takes nothing of what is computed with it"
        ),
        ("online_softmax.cuh", _DIFFERENCE, _DIFFERENCE.replace("kAnySize", "true")): (
            "one more instruction: time, no result"
        ),
        ("tile_copy.cuh", _EXISTS, _EXISTS.replace("kWhole", "false")): (ASKS_IN_VAIN),
        ("tile_copy.cuh", _PIN, _PIN.replace("i == 0", "true")): (
            "the same address in another register"
        ),
        ("tile_copy.cuh", _CHUNK, _CHUNK.replace("i == 0", "false")): (
            "the same address in another register"
        ),
        ("kvcache_append.cuh", _ACROSS, "const int across = (kThreads);"): (
            "threads beyond the last piece have nothing to do: time, no result"
        ),
        ("kvcache_append.cuh", _TURN, _TURN.replace("p.rotary_cos ?", "true ?")): (
            "without tables rotary_dim is 0, and no column is before it"
        ),
    }
    | {
        ("backward_keys.cuh", before, after): reason
        for before, after, reason in (
            (_KEYS_TO_HIDE, f"if (true) {_NO_WHOLE_TILES}", MORE_MASKS),
            (
                _KEYS_TO_HIDE,
                f"if (b_.key_begin + kKeys >= s_.seqlen_k) {_NO_WHOLE_TILES}",
                MORE_MASKS,
            ),
            (_KEYS_MASK, _KEYS_MASK.replace(" < ", " <= "), MORE_MASKS),
            ("if (!block.has_keys()) return;", "if (false) return;", NO_KEYS),
        )
    }
    | {
        ("gradients.cuh", before, after): reason
        for before, after, reason in (
            (_ADDS_TERMS, "if (true) {", "without terms nothing is added"),
            *(
                (_ADDS_TERMS, _ADDS_TERMS.replace(part, "true"), "without terms nothing is added")
                for part in ("kAll", "p_.bias")
            ),
            (_BIAS_ROWS, "const int32_t end_row = (int32_t(p.seqlen_q));", ADDS_ZERO),
            (_BIAS_ROWS, "const int32_t end_row = (s.seqlen_q);", ONLY_SHORTER),
            (_BIAS_KEYS, "const int32_t end_key = (int32_t(p.seqlen_k));", ADDS_ZERO),
            (_BIAS_KEYS, "const int32_t end_key = (s.seqlen_k);", ONLY_SHORTER),
            ("if (row_stride != 0) return;", "if (false) return;", SUM_IS_ZERO),
            ("if (row_stride != 0) continue;", "if (false) continue;", SUM_IS_ZERO),
            (_MASKED, _MASKED.replace("masked", "true"), MORE_MASKS),
            ("if (mask.window_left < 0) return;", "if (false) return;", MORE_MASKS),
            (_SOME_DROPPED, "if (true) {", KEEPS_ALL),
            (_SOME_DROPPED, "if (a_.dropout_threshold >= 0) {", KEEPS_ALL),
            (_KEPT, _KEPT.replace(">=", ">"), "of a probability of 0 the gradient is 0 either way"),
        )
    }
    | {
        ("backward_far_rows.cuh", before, after): reason
        for before, after, reason in (
            (
                "if (sum == 0) return {0, infinity(), -infinity()};  // without keys",
                "if (false) return {0, infinity(), -infinity()};  // without keys",
                _OF_OTHERS,
            ),
            (_MERGED, _MERGED.replace(" < ", " <= "), _OF_OTHERS),
            (_FAR_NUMBERS, _FAR_NUMBERS.replace("merged", "false"), _OF_OTHERS),
            ("if (x > max) {", "if (x >= max) {", "factors of 1"),
            (
                "const float lse = sink > 100 ? sink : ptx::lg2(sum + ptx::ex2(sink));",
                "const float lse = sink >= 100 ? sink : ptx::lg2(sum + ptx::ex2(sink));",
                _LEAST_DIFFERENCE,
            ),
            (_HAS_ROWS, "if (false) return;", "such tiles have numbers of their own"),
            (
                _OWN_ROWS_FAR,
                _OWN_ROWS_FAR.replace("s.index == p.batch", "false"),
                "their lse is +inf",
            ),
        )
    }
    | {
        ("backward_queries.cuh", before, after): reason
        for before, after, reason in (
            (_ROWS_OF_TILE, "const int32_t end_row = (b_.row_begin + kShape.rows);", MORE_TILES),
            (_ROWS_OF_TILE, "const int32_t end_row = (s_.seqlen_q);", MORE_TILES),
            (_QUERIES_MASK, _QUERIES_MASK.replace("tile < whole", "tile <= whole"), MORE_MASKS),
            (_HAS_ROWS, "if (false) return;", NO_ROWS),
        )
    }
    | {
        ("block.cuh", line, line.replace(" < ", " <= ")): NO_ROWS
        for line in (_HAS_KEYS, _ROWS_LEFT)
    }
    | {
        ("backward_rows.cuh", before, after): reason
        for before, after, reason in (
            ("if (block.has_rows(a)) {", "if (true) {", "such tiles have numbers of their own"),
            (_OWN_ROWS, _OWN_ROWS.replace("s.index == p.batch", "false"), "their lse is +inf"),
            (_HAS_ROWS, "if (false) return;", NO_ROWS),
            (_FINISH_END, "const int32_t end = (block.row_begin + kRowTile);", NO_ROWS),
        )
    }
)
