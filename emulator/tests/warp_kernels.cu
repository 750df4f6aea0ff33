// One warp instruction per kernel, for test_warp.cpp. Each thread brings its operands from `in` and
// takes its results to `out`, kWords words per thread.
#include "emulator/tests/test_kernel.cuh"

// ---- matrices ----

// in: a (4), b (2); accumulators start as 0, 1, 2, 3
#define MMA_K16(type)                                                                 \
  KERNEL(mma_m16n8k16_##type) {                                                       \
    THREADS_OWN;                                                                      \
    float d[4] = {0, 1, 2, 3};                                                        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." #type "." #type             \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
                 : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(x[4]), "r"(x[5])); \
    for (int i = 0; i < 4; ++i) y[i] = __float_as_uint(d[i]);                         \
  }
MMA_K16(f16)
MMA_K16(bf16)

// in: a (2), b (1)
#define MMA_K8(type)                                                     \
  KERNEL(mma_m16n8k8_##type) {                                           \
    THREADS_OWN;                                                         \
    float d[4] = {0, 1, 2, 3};                                           \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." #type "." #type \
                 ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])        \
                 : "r"(x[0]), "r"(x[1]), "r"(x[2]));                     \
    for (int i = 0; i < 4; ++i) y[i] = __float_as_uint(d[i]);            \
  }
MMA_K8(f16)
MMA_K8(bf16)

// Shared memory holds the 16-bit numbers 0, 1, 2, ...; in: the offset of the lane's row
#define LDMATRIX(name, modifiers, results, address, ...)                                       \
  KERNEL(name) {                                                                               \
    THREADS_OWN;                                                                               \
    for (int i = threadIdx.x; i < 512; i += 32) ((uint16_t*)shared)[i] = uint16_t(i);          \
    __syncwarp();                                                                              \
    uint32_t r[4] = {};                                                                        \
    asm volatile("ldmatrix.sync.aligned.m8n8." modifiers "shared.b16 {" results "}, [" address \
                 "];"                                                                          \
                 : __VA_ARGS__                                                                 \
                 : "r"(shared_address(shared) + x[0]));                                        \
    for (int i = 0; i < 4; ++i) y[i] = r[i];                                                   \
  }
LDMATRIX(ldmatrix_x1, "x1.", "%0", "%1", "=r"(r[0]))
LDMATRIX(ldmatrix_x2, "x2.", "%0,%1", "%2", "=r"(r[0]), "=r"(r[1]))
LDMATRIX(ldmatrix_x4, "x4.", "%0,%1,%2,%3", "%4", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]))
LDMATRIX(ldmatrix_x1_trans, "x1.trans.", "%0", "%1", "=r"(r[0]))
LDMATRIX(ldmatrix_x2_trans, "x2.trans.", "%0,%1", "%2", "=r"(r[0]), "=r"(r[1]))
LDMATRIX(ldmatrix_x4_trans, "x4.trans.", "%0,%1,%2,%3", "%4", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]),
         "=r"(r[3]))

KERNEL(movmatrix) {
  THREADS_OWN;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y[0]) : "r"(x[0]));
}

// ---- shuffles and votes ----

// in: value, b, c, mask; out: result, predicate
#define SHFL(mode)                                                    \
  KERNEL(shfl_##mode) {                                               \
    THREADS_OWN;                                                      \
    uint32_t result, valid;                                           \
    asm volatile("{ .reg .pred p; shfl.sync." #mode                   \
                 ".b32 %0|p, %2, %3, %4, %5; selp.b32 %1, 1, 0, p; }" \
                 : "=r"(result), "=r"(valid)                          \
                 : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]));       \
    y[0] = result;                                                    \
    y[1] = valid;                                                     \
  }
SHFL(up)
SHFL(down)
SHFL(bfly)
SHFL(idx)

// in: value; out: ballot of its lowest bit, all, any, uni, match_any, match_all and its predicate,
// activemask
KERNEL(votes) {
  THREADS_OWN;
  const bool p = x[0] & 1;
  y[0] = __ballot_sync(~0u, p);
  y[1] = __all_sync(~0u, p);
  y[2] = __any_sync(~0u, p);
  y[3] = __uni_sync(~0u, p);
  y[4] = __match_any_sync(~0u, x[0]);
  int same;
  y[5] = __match_all_sync(~0u, x[0], &same);
  y[6] = same;
  y[7] = __activemask();
}

KERNEL(reductions) {
  THREADS_OWN;
  y[0] = __reduce_add_sync(~0u, x[0]);
  y[1] = __reduce_min_sync(~0u, x[0]);
  y[2] = __reduce_max_sync(~0u, x[0]);
  y[3] = __reduce_min_sync(~0u, int(x[0]));
  y[4] = __reduce_max_sync(~0u, int(x[0]));
  y[5] = __reduce_and_sync(~0u, x[0]);
  y[6] = __reduce_or_sync(~0u, x[0]);
  y[7] = __reduce_xor_sync(~0u, x[0]);
}

KERNEL(barrier_reductions) {
  THREADS_OWN;
  y[0] = __syncthreads_count(x[0]);
  y[1] = __syncthreads_and(x[0]);
  y[2] = __syncthreads_or(x[0]);
}

// ---- copies ----

// in: as many words as threads, then source bytes per thread
#define CP_ASYNC(name, level, size)                                                        \
  KERNEL(name) {                                                                           \
    const uint32_t at = shared_address(shared) + threadIdx.x * size;                       \
    asm volatile("cp.async." level ".shared.global [%0], [%1], " #size ", %2;" ::"r"(at),  \
                 "l"(reinterpret_cast<const char*>(in) + threadIdx.x * size),              \
                 "r"(in[32 * size / 4 + threadIdx.x])                                      \
                 : "memory");                                                              \
    asm volatile("cp.async.commit_group;" ::: "memory");                                   \
    asm volatile("cp.async.wait_group 0;" ::: "memory");                                   \
    __syncwarp();                                                                          \
    for (int i = threadIdx.x; i < 32 * size / 4; i += 32) out[i] = ((uint32_t*)shared)[i]; \
  }
CP_ASYNC(cp_async_16, "cg", 16)
CP_ASYNC(cp_async_8, "ca", 8)
CP_ASYNC(cp_async_4, "ca", 4)

// ---- atomics: in[0] is the operand, out[0] .. the cells; thread 0 also returns the old values
// ----

#define ATOMICS(name, cells)                                 \
  KERNEL(name) {                                             \
    uint32_t* c = cells;                                     \
    if (threadIdx.x == 0) {                                  \
      for (int i = 0; i < 16; ++i) c[i] = in[i];             \
    }                                                        \
    __syncthreads();                                         \
    if (threadIdx.x < 4) {                                   \
      atomicAdd(&c[0], 3);                                   \
      atomicSub(&c[1], 3);                                   \
      atomicMin((int*)&c[2], -int(threadIdx.x));             \
      atomicMax(&c[3], threadIdx.x);                         \
      atomicAnd(&c[4], 0xFFu << threadIdx.x);                \
      atomicOr(&c[5], 1u << threadIdx.x);                    \
      atomicXor(&c[6], 1u << threadIdx.x);                   \
      atomicInc(&c[7], 2);                                   \
      atomicDec(&c[8], 2);                                   \
      atomicAdd((float*)&c[9], 0.5f);                        \
      atomicCAS(&c[10], threadIdx.x, threadIdx.x + 1);       \
      atomicAdd((unsigned long long*)&c[12], 1ull << 31);    \
      if (threadIdx.x == 3) c[11] = atomicExch(&c[14], 77);  \
    }                                                        \
    __syncthreads();                                         \
    if (threadIdx.x < 16) out[threadIdx.x] = c[threadIdx.x]; \
  }
ATOMICS(atomics_shared, reinterpret_cast<uint32_t*>(shared))
ATOMICS(atomics_global, out)

// Generic addresses: shared or global memory is known at run time only.
KERNEL(generic) {
  volatile uint32_t* cells = in[0] ? reinterpret_cast<uint32_t*>(shared) : out + 32;
  cells[threadIdx.x] = threadIdx.x;
  __syncthreads();
  atomicAdd(const_cast<uint32_t*>(cells) + (threadIdx.x ^ 1), 100);
  __syncthreads();
  out[threadIdx.x] = cells[31 - threadIdx.x];
}

// Without a result, and instructions without a visible effect. Half of the threads leave early.
KERNEL(quiet) {
  asm volatile("red.global.add.u32 [%0], %1;" ::"l"(out), "r"(in[0]) : "memory");
  asm volatile("red.relaxed.gpu.global.max.s32 [%0], %1;" ::"l"(out + 1), "r"(threadIdx.x)
               : "memory");
  asm volatile("prefetch.global.L2 [%0];" ::"l"(in));
  asm volatile("membar.gl;" ::: "memory");
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  asm volatile("nanosleep.u32 100;");
  asm volatile("barrier.sync 0;" ::: "memory");
  if (threadIdx.x >= 16) asm volatile("exit;");
  out[2 + threadIdx.x] = threadIdx.x;
}

// ---- functions of numbers; in: one float ----

#define FUNCTION(result, instruction)                                                    \
  asm volatile("{ .reg .f32 a, b; mov.b32 a, %1; " instruction " b, a; mov.b32 %0, b; }" \
               : "=r"(result)                                                            \
               : "r"(x[0]))

KERNEL(functions) {
  THREADS_OWN;
  FUNCTION(y[0], "ex2.approx.ftz.f32");
  FUNCTION(y[1], "lg2.approx.ftz.f32");
  FUNCTION(y[2], "rcp.approx.ftz.f32");
  FUNCTION(y[3], "rsqrt.approx.ftz.f32");
  FUNCTION(y[4], "sqrt.approx.ftz.f32");
  FUNCTION(y[5], "sin.approx.ftz.f32");
  FUNCTION(y[6], "cos.approx.ftz.f32");
  FUNCTION(y[7], "ex2.approx.f32");
}

KERNEL(tanh_approx) {
  THREADS_OWN;
  FUNCTION(y[0], "tanh.approx.f32");
}

KERNEL(conversions) {  // in: two floats
  THREADS_OWN;
#define CONVERSION(result, instruction, ...) \
  asm volatile(instruction " %0, " __VA_ARGS__ ";" : "=r"(result) : "f"(a), "f"(b))
  const float a = __uint_as_float(x[0]), b = __uint_as_float(x[1]);
  CONVERSION(y[0], "cvt.rn.f16x2.f32", "%1, %2");
  CONVERSION(y[1], "cvt.rn.bf16x2.f32", "%1, %2");
  CONVERSION(y[2], "cvt.rz.f16x2.f32", "%1, %2");
  CONVERSION(y[3], "cvt.rz.bf16x2.f32", "%1, %2");
  CONVERSION(y[4], "cvt.rn.relu.bf16x2.f32", "%1, %2");
  CONVERSION(y[5], "cvt.rna.tf32.f32", "%1");
  CONVERSION(y[6], "cvt.rni.s32.f32", "%1");
  CONVERSION(y[7], "cvt.rzi.u32.f32", "%1");
}

// ---- what nvcc makes of C++: local arrays, calls, tables, static shared memory, switches ----

__constant__ int table[8] = {2, 3, 5, 7, 11, 13, 17, 19};
__device__ float scale_of_all = 0.5f;

__noinline__ __device__ uint32_t called(uint32_t a, const uint32_t* b) { return a * 3 + *b; }

KERNEL(compiled) {
  THREADS_OWN;
  __shared__ uint32_t exchange[32];
  exchange[threadIdx.x] = x[0];
  __syncthreads();
  uint32_t local[8];
  for (int i = 0; i < 8; ++i) local[i] = x[i] + table[i];
  y[0] = local[x[1] & 7];                 // an index known at run time only
  y[1] = called(x[0], &local[x[2] & 7]);  // a call with a pointer to it
  y[2] = exchange[31 - threadIdx.x];
  y[3] = __float_as_uint(scale_of_all * float(x[0]));
  switch (x[3]) {
    case 0:
      y[4] = 10;
      break;
    case 1:
      y[4] = x[0];
      break;
    case 2:
      y[4] = x[1] + 5;
      break;
    case 3:
      y[4] = x[2] ^ 9;
      break;
    case 4:
      y[4] = __popc(x[0]);
      break;
    default:
      y[4] = 99;
  }
  const uint4 wide = *reinterpret_cast<const uint4*>(x);
  *reinterpret_cast<uint2*>(y + 6) = make_uint2(wide.w, wide.z);
  y[5] = uint32_t((uint64_t(x[0]) << 32 | x[1]) / (x[2] + 1));
}
