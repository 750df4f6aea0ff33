// sm_90 instructions, for test_hopper.cpp: mbarriers, bulk copies, wgmma.
#include "emulator/tests/test_kernel.cuh"

#define MAP_KERNEL(name)                                             \
  extern "C" __global__ void name(uint32_t* out, const uint32_t* in, \
                                  const __grid_constant__ Map map)

__device__ void init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ void expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ uint32_t test_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, "
      "p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}
__device__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- warps ----

// in: offset of the lane's row, registers (4); out: the 512 bytes
#define STMATRIX(name, modifiers, registers)                                            \
  KERNEL(name) {                                                                        \
    const uint32_t* x = in + threadIdx.x * kWords;                                      \
    for (int i = threadIdx.x; i < 128; i += 32) ((uint32_t*)shared)[i] = 0;             \
    __syncwarp();                                                                       \
    asm volatile("stmatrix.sync.aligned.m8n8." modifiers "shared.b16 [%0], {" registers \
                 "};" ::"r"(shared_address(shared) + x[0]),                             \
                 "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(x[4])                             \
                 : "memory");                                                           \
    __syncwarp();                                                                       \
    for (int i = threadIdx.x; i < 128; i += 32) out[i] = ((uint32_t*)shared)[i];        \
  }
STMATRIX(stmatrix_x1, "x1.", "%1")
STMATRIX(stmatrix_x2, "x2.", "%1,%2")
STMATRIX(stmatrix_x4, "x4.", "%1,%2,%3,%4")
STMATRIX(stmatrix_x4_trans, "x4.trans.", "%1,%2,%3,%4")

KERNEL(elect) {
  uint32_t* y = out + threadIdx.x * kWords;
  asm volatile("{ .reg .pred p; elect.sync %0|p, 0xFFFFFFFF; selp.b32 %1, 1, 0, p; }"
               : "=r"(y[0]), "=r"(y[1]));
}

// ---- mbarriers ----

// 64 threads arrive three times; out: what a test of both parities said before and after each time.
KERNEL(mbarrier_phases) {
  const uint32_t barrier = shared_address(shared);
  if (threadIdx.x == 0) init(barrier, 64);
  __syncthreads();
  for (uint32_t round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) {
      out[round * 4 + 0] = test_wait(barrier, 0);
      out[round * 4 + 1] = test_wait(barrier, 1);
    }
    __syncthreads();
    arrive(barrier);
    wait(barrier, round & 1);
    if (threadIdx.x == 0) {
      out[round * 4 + 2] = test_wait(barrier, 0);
      out[round * 4 + 3] = test_wait(barrier, 1);
    }
    __syncthreads();
  }
}

// cp.async.mbarrier.arrive.noinc: the barrier completes when every thread's copies have.
KERNEL(cp_async_arrives) {
  const uint32_t barrier = shared_address(shared), data = barrier + 16;
  if (threadIdx.x == 0) init(barrier, 32);
  __syncthreads();
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(data + threadIdx.x * 4),
               "l"(in + threadIdx.x)
               : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
  wait(barrier, 0);
  out[threadIdx.x] = reinterpret_cast<uint32_t*>(shared + 16)[31 - threadIdx.x];
}

// ---- bulk copies ----

// One box at coordinates in[0..2], in[3] bytes, to out as it lies in shared memory.
MAP_KERNEL(tma_load_3d) {
  const uint32_t tile = shared_address(shared), barrier = tile + 16384;
  if (threadIdx.x == 0) {
    init(barrier, 1);
    expect(barrier, in[3]);
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
        "{%3, "
        "%4, %5}], [%2];" ::"r"(tile),
        "l"(&map), "r"(barrier), "r"(in[0]), "r"(in[1]), "r"(in[2])
        : "memory");
  }
  __syncthreads();
  wait(barrier, 0);
  for (uint32_t i = threadIdx.x; i < in[3] / 4; i += blockDim.x) {
    out[i] = reinterpret_cast<uint32_t*>(shared)[i];
  }
}

// in[4] and on is the image in shared memory of a box that goes to coordinates in[0..2].
#define TMA_OUT(name, instruction)                                                 \
  MAP_KERNEL(name) {                                                               \
    for (uint32_t i = threadIdx.x; i < in[3] / 4; i += blockDim.x) {               \
      reinterpret_cast<uint32_t*>(shared)[i] = in[4 + i];                          \
    }                                                                              \
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                   \
    __syncthreads();                                                               \
    if (threadIdx.x == 0) {                                                        \
      asm volatile(instruction " [%0, {%2, %3, %4}], [%1];" ::"l"(&map),           \
                   "r"(shared_address(shared)), "r"(in[0]), "r"(in[1]), "r"(in[2]) \
                   : "memory");                                                    \
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");                    \
      asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");                    \
    }                                                                              \
  }
TMA_OUT(tma_store_3d, "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group")
TMA_OUT(tma_reduce_3d, "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group")

// in to shared memory to out, and added to out once more as fp32.
KERNEL(bulk_copies) {
  const uint32_t data = shared_address(shared), barrier = data + 1024;
  if (threadIdx.x == 0) {
    init(barrier, 1);
    expect(barrier, 256);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 256, "
        "[%2];" ::"r"(data),
        "l"(in), "r"(barrier)
        : "memory");
    wait(barrier, 0);
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 256;" ::"l"(out),
                 "r"(data)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], 256;" ::"l"(out),
        "r"(data)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

// ---- wgmma m64n64k16, four steps over k ----

// in: start, leading and stride byte offsets and bytes per step of A (4), of B (4), layout (1: 128,
// 2: 64, 3: 32 bytes of swizzle, 0: none), then from word 16 on the image of shared memory (16 KB),
// then for A from registers 4 steps of 4 words per thread. out: 32 accumulators per thread.
__device__ uint64_t descriptor(const uint32_t* in, uint32_t layout, uint32_t step) {
  const uint32_t start = shared_address(shared) + in[0] + step * in[3];
  return uint64_t((start & 0x3FFFF) >> 4) | uint64_t(in[1] >> 4) << 16 |
         uint64_t(in[2] >> 4) << 32 | uint64_t(layout) << 62;
}

__device__ const uint32_t* fragment(const uint32_t* in, uint32_t step) {
  return in + 16 + 4096 + (step * 128 + threadIdx.x) * 4;
}

#define D(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACCUMULATORS D(0), D(4), D(8), D(12), D(16), D(20), D(24), D(28)
#define NAMES                                                                           \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22," \
  "%23,%24,%25,%26,%27,%28,%29,%30,%31}"

#define WGMMA(name, issue)                                                          \
  KERNEL(name) {                                                                    \
    for (int i = threadIdx.x; i < 4096; i += 128) {                                 \
      reinterpret_cast<uint32_t*>(shared)[i] = in[16 + i];                          \
    }                                                                               \
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                    \
    __syncthreads();                                                                \
    float d[32];                                                                    \
    for (int i = 0; i < 32; ++i) d[i] = float(i);                                   \
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");                         \
    for (int step = 0; step < 4; ++step) {                                          \
      const uint64_t b = descriptor(in + 4, in[8], step);                           \
      issue;                                                                        \
    }                                                                               \
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");                  \
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");                  \
    for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = __float_as_uint(d[i]); \
  }

#define SHARED_A(types, flags)                                                                \
  asm volatile(                                                                               \
      "{ .reg .pred p; setp.ne.b32 p, %34, 99; wgmma.mma_async.sync.aligned.m64n64k16." types \
      " " NAMES ", %32, %33, p, " flags "; }"                                                 \
      : ACCUMULATORS                                                                          \
      : "l"(descriptor(in, in[8], step)), "l"(b), "r"(step))
WGMMA(wgmma_bf16, SHARED_A("f32.bf16.bf16", "1, 1, 0, 0"))
WGMMA(wgmma_f16_negated, SHARED_A("f32.f16.f16", "-1, 1, 0, 0"))
WGMMA(wgmma_bf16_b_transposed, SHARED_A("f32.bf16.bf16", "1, 1, 0, 1"))
WGMMA(wgmma_bf16_both_transposed, SHARED_A("f32.bf16.bf16", "1, 1, 1, 1"))
// The first step overwrites the accumulators.
WGMMA(wgmma_f16_registers,
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16."
          "f32.f16.f16 " NAMES
          ", {%32, %33, %34, %35}, %36, p, 1, 1, 1; }" : ACCUMULATORS : "r"(fragment(in, step)[0]),
          "r"(fragment(in, step)[1]), "r"(fragment(in, step)[2]), "r"(fragment(in, step)[3]),
          "l"(b), "r"(step)))

// Of launches that overlap.
KERNEL(dependent) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  out[threadIdx.x] = in[threadIdx.x];
  asm volatile("griddepcontrol.launch_dependents;");
}

// Registers move from the producer to the consumer; named barriers between two warpgroups.
KERNEL(warpgroups) {
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    reinterpret_cast<uint32_t*>(shared)[threadIdx.x] = in[threadIdx.x];
    asm volatile("bar.arrive 1, 256;" ::: "memory");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    asm volatile("bar.sync 1, 256;" ::: "memory");
    out[threadIdx.x - 128] = reinterpret_cast<uint32_t*>(shared)[255 - threadIdx.x];
  }
}
