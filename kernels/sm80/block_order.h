// In which order the blocks of a forward take their tiles of rows. Host code that needs no CUDA,
// and device code.
//
// Under a causal mask a tile's time grows with its rows, and a GPU is full to the end only if the
// longest come first, over all heads. Heads far apart share no keys in the L2 cache, so the order
// goes through them in sections: as many as fit into half of it, and enough that a section fills
// the GPU.
#pragma once

#include "kernels/masks.h"

namespace anyflash::sm80 {

struct BlockOrder {
  int32_t row_tiles;
  int32_t pairs;    // of a sequence and a head, or a head of a packed batch
  int32_t section;  // pairs

  struct Place {
    int32_t pair;
    int32_t row_tile;
  };

  // `fitting`: pairs whose keys and values are half of the L2 cache. `slots`: blocks that the GPU
  // holds at a time; four of a pair share what they read.
  ANYFLASH_HOST_DEVICE static BlockOrder of(int64_t row_tiles, int64_t pairs, int64_t slots,
                                            int64_t fitting) {
    const int64_t most = larger<int64_t>(larger(slots / 4, fitting), 1);
    const int64_t sections = larger<int64_t>((pairs + most - 1) / most, 1);
    return {int32_t(row_tiles), int32_t(pairs),
            int32_t(larger<int64_t>((pairs + sections - 1) / sections, 1))};
  }

  ANYFLASH_HOST_DEVICE Place at(int32_t block) const {
    const int32_t first = block / (section * row_tiles) * section;
    const int32_t pairs_here = smaller(section, pairs - first);
    const int32_t rest = block - first * row_tiles;
    return {first + rest % pairs_here, row_tiles - 1 - rest / pairs_here};
  }
};

}  // namespace anyflash::sm80
