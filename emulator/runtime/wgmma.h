// wgmma.mma_async, by the 128 threads of a warpgroup.
#pragma once

namespace emu {

void begin_block_wgmma();
void end_thread_wgmma();  // reports products that the running thread did not wait for

}  // namespace emu
