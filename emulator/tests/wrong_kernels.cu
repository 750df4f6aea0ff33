// Kernels with one mistake each, for test_reports.cpp. What is right beside it has the same name
// with "fine".
#include "emulator/tests/test_kernel.cuh"

#define WORDS reinterpret_cast<volatile uint32_t*>(shared)

__device__ void copy_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ void wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ void init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ void fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ void expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- shared memory, 64 threads: two warps ----

KERNEL(exchange_fine) {
  WORDS[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = WORDS[63 - threadIdx.x];
  __syncthreads();
  WORDS[threadIdx.x] = 0;
}
KERNEL(read_before_barrier) {
  WORDS[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = WORDS[63 - threadIdx.x];
}
KERNEL(write_after_read) {
  WORDS[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = WORDS[63 - threadIdx.x];
  WORDS[threadIdx.x] = 0;
}
KERNEL(write_twice) { WORDS[threadIdx.x % 32] = threadIdx.x; }
KERNEL(warp_exchange_fine) {
  WORDS[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = WORDS[threadIdx.x ^ 1];
}
KERNEL(warp_exchange) {  // a shuffle orders nothing
  WORDS[threadIdx.x] = threadIdx.x;
  const uint32_t other = __shfl_xor_sync(~0u, threadIdx.x, 1);
  out[threadIdx.x] = WORDS[other];
}
KERNEL(never_written) { out[threadIdx.x] = WORDS[threadIdx.x]; }
KERNEL(beyond_shared) { WORDS[in[0]] = 1; }
KERNEL(misaligned_shared) { *reinterpret_cast<volatile uint32_t*>(shared + 2) = 1; }
KERNEL(misaligned_ldmatrix) {
  WORDS[threadIdx.x] = 0;
  __syncthreads();
  uint32_t r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r)
               : "r"(shared_address(shared) + 8));
  out[threadIdx.x] = r;
}

// ---- global memory ----

KERNEL(global_exchange) {
  out[threadIdx.x] = threadIdx.x;
  out[64 + threadIdx.x] = *reinterpret_cast<volatile uint32_t*>(out + 63 - threadIdx.x);
}
KERNEL(global_exchange_fine) {
  out[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[64 + threadIdx.x] = *reinterpret_cast<volatile uint32_t*>(out + 63 - threadIdx.x);
}
KERNEL(blocks_write_same) { out[threadIdx.x] = blockIdx.x; }
KERNEL(blocks_write_own_fine) { out[blockIdx.x * 64 + threadIdx.x] = blockIdx.x; }
KERNEL(blocks_read_others) {
  out[blockIdx.x * 64 + threadIdx.x] = 1;
  out[256 + blockIdx.x * 64 + threadIdx.x] =
      *reinterpret_cast<volatile uint32_t*>(out + (blockIdx.x ^ 1) * 64 + threadIdx.x);
}
KERNEL(blocks_add_fine) { atomicAdd(out, 1); }
KERNEL(beyond_global) { out[in[0]] = 1; }
KERNEL(misaligned_global) { *reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(out) + 2) = 1; }

// ---- cp.async: every thread 16 bytes of its own ----

KERNEL(copy_fine) {
  copy_16(shared_address(shared) + threadIdx.x * 16, in + threadIdx.x * 4);
  commit();
  wait_all();
  __syncthreads();
  out[threadIdx.x] = WORDS[(63 - threadIdx.x) * 4];
}
KERNEL(copy_not_waited_for) {
  copy_16(shared_address(shared) + threadIdx.x * 16, in + threadIdx.x * 4);
  commit();
  __syncthreads();
  out[threadIdx.x] = WORDS[threadIdx.x * 4];
  wait_all();
}
KERNEL(copy_without_barrier) {
  copy_16(shared_address(shared) + threadIdx.x * 16, in + threadIdx.x * 4);
  commit();
  wait_all();
  out[threadIdx.x] = WORDS[(63 - threadIdx.x) * 4];
}
KERNEL(copy_left_at_exit) {
  copy_16(shared_address(shared) + threadIdx.x * 16, in + threadIdx.x * 4);
  commit();
}

// ---- divergence and barriers ----

KERNEL(half_a_warp_in_mma) {
  float d[4] = {};
  if (in[threadIdx.x] == 0) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%4}, {%4}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(0));
    out[threadIdx.x] = __float_as_uint(d[0]);
  }
}
KERNEL(mask_without_caller) { out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, threadIdx.x, 1); }
KERNEL(half_a_block_at_barrier) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    asm volatile("bar.sync 1, 64;" ::: "memory");
  }
}
KERNEL(two_counts) {
  if (threadIdx.x < 32) {
    asm volatile("bar.sync 1, 64;" ::: "memory");
  } else {
    asm volatile("bar.sync 1, 96;" ::: "memory");
  }
}
KERNEL(bad_barrier) { asm volatile("bar.sync 1, %0;" ::"r"(in[0]) : "memory"); }

// ---- mbarriers and bulk copies ----

KERNEL(load_fine) {
  const uint32_t data = shared_address(shared), barrier = data + 1024;
  if (threadIdx.x == 0) {
    init(barrier, 1);
    fence_init();
    expect(barrier, 256);
    bulk_load(data, in, 256, barrier);
  }
  __syncthreads();
  wait(barrier, 0);
  out[threadIdx.x] = WORDS[threadIdx.x];
}
KERNEL(load_not_waited_for) {
  const uint32_t data = shared_address(shared), barrier = data + 1024;
  if (threadIdx.x == 0) {
    init(barrier, 1);
    fence_init();
    expect(barrier, 256);
    bulk_load(data, in, 256, barrier);
  }
  __syncthreads();
  out[threadIdx.x] = WORDS[threadIdx.x];
  wait(barrier, 0);
}
KERNEL(too_many_bytes_expected) {
  const uint32_t data = shared_address(shared), barrier = data + 1024;
  if (threadIdx.x == 0) {
    init(barrier, 1);
    fence_init();
    expect(barrier, 272);
    bulk_load(data, in, 256, barrier);
  }
  __syncthreads();
  wait(barrier, 0);
}
KERNEL(barrier_without_init) {
  WORDS[threadIdx.x] = 0;
  __syncthreads();
  arrive(shared_address(shared));
}
KERNEL(too_many_arrivals) {  // the first makes the phase wait for bytes alone
  if (threadIdx.x == 0) {
    init(shared_address(shared), 1);
    expect(shared_address(shared), 256);
    arrive(shared_address(shared));
  }
}
KERNEL(store_fine) {
  WORDS[threadIdx.x] = threadIdx.x;
  fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, shared_address(shared), 256);
    bulk_wait();
  }
}
KERNEL(store_without_fence) {
  WORDS[threadIdx.x] = threadIdx.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, shared_address(shared), 256);
    bulk_wait();
  }
}
KERNEL(store_overwritten) {
  WORDS[threadIdx.x] = threadIdx.x;
  fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, shared_address(shared), 256);
    WORDS[0] = 1;
    bulk_wait();
  }
}
KERNEL(store_left_at_exit) {
  WORDS[threadIdx.x] = threadIdx.x;
  fence();
  __syncthreads();
  if (threadIdx.x == 0) bulk_store(out, shared_address(shared), 256);
}

// ---- wgmma, 128 threads: A and B are 4 KB of shared memory ----

__device__ void product(float (&d)[4]) {
  const uint64_t tile =
      uint64_t(shared_address(shared) >> 4) | uint64_t(8) << 16 | uint64_t(16) << 32;
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 "
      "{%0,%1,%2,%3}, %4, %4, p, 1, 1, 0, 0; }"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(tile));
}
__device__ void fill() {
  for (int i = threadIdx.x; i < 1024; i += 128) WORDS[i] = 0;
  fence();
  __syncthreads();
}
__device__ void before() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
__device__ void after() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  wait_for_products();
}
#define WGMMA(name, ...)                                                          \
  KERNEL(name) {                                                                  \
    float d[4] = {};                                                              \
    __VA_ARGS__;                                                                  \
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = __float_as_uint(d[i]); \
  }
WGMMA(wgmma_fine, fill(), before(), product(d), after())
WGMMA(wgmma_without_fence, fill(), product(d), after())
WGMMA(wgmma_not_committed, fill(), before(), product(d), wait_for_products())
WGMMA(wgmma_not_waited_for, fill(), before(), product(d))
WGMMA(wgmma_operand_overwritten, fill(), before(), product(d), WORDS[threadIdx.x] = 1, after())
WGMMA(wgmma_without_proxy_fence, for (int i = threadIdx.x; i < 1024; i += 128) WORDS[i] = 0;
      __syncthreads(), before(), product(d), after())
KERNEL(too_many_registers) { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); }

// ---- bank conflicts: 32 rows of 16 bytes at a distance of in[0] bytes ----

KERNEL(rows_apart) {
  uint32_t r[4];
  for (int i = threadIdx.x; i < 1024; i += 32) WORDS[i] = 0;
  __syncwarp();
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared) + threadIdx.x * in[0]));
  out[threadIdx.x] = r[0] + r[1] + r[2] + r[3];
}
KERNEL(words_apart) { WORDS[threadIdx.x * in[0]] = 1; }
