// The attention kernels of one instruction set, as instance.cpp.in puts them into tables.
#pragma once

#include "kernels/cpu/backward.h"
#include "kernels/cpu/backward_bias.h"
#include "kernels/cpu/backward_far_rows.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/forward.h"

namespace anyflash::cpu::ANYFLASH_ISA {

template <class T>
ANYFLASH_INLINE ForwardKernels forward_kernels() {
  return {kItemRows,     kMaxDecodeRows + 1,      forward_scratch_bytes<T>, forward_item<T>,
          can_decode<T>, decode_scratch_bytes<T>, decode_item<T>,           combine_parts<T>};
}

template <class T>
ANYFLASH_INLINE BackwardKernels backward_kernels() {
  return {kPanel,           kBlock,
          max_chunk_keys,   backward_scratch_bytes<T>,
          backward_item<T>, delta_rows<T>,
          sink_gradient,    far_rows_scratch_bytes<T>,
          far_rows<T>,      bias_scratch_bytes<T>,
          bias_item<T>};
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
