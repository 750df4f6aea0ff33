// Attention over a key/value cache: what _flash_attn_kvcache_ was called with. The core sees the
// same as views (core/kvcache.h).
#pragma once

#include "attention/arguments.h"
#include "core/kvcache.h"

namespace anyflash {

struct KVCacheArgs : AttentionOptions {
  Tensor q, k_cache, v_cache;
  OptionalTensor k{}, v{};
  OptionalTensor rotary_cos{}, rotary_sin{};
  OptionalTensor cache_seqlens{}, cache_batch_idx{}, cache_leftpad{}, block_table{};
  OptionalTensor alibi_slopes{}, sinks{};
  bool rotary_interleaved = true;
};

// x (batch, seqlen, heads, head_dim) turned by the angles of its positions `where` (batch, seqlen)
// int64; fp32 arithmetic, x's dtype.
Tensor rotate(const Tensor& x, const Tensor& rotary_cos, const Tensor& rotary_sin,
              const Tensor& where, bool interleaved);

// Writes k and v (batch, seqlen_new, ...) to the rows `rows` (batch, seqlen_new) int64 of the
// caches. No host synchronisation.
void append(const KVCacheArgs& args, const Tensor& k, const Tensor& v, const Tensor& rows);

}  // namespace anyflash
