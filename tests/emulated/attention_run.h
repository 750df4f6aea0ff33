// A problem on kernels that have memory of their own: the emulator's, or a GPU's.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "kernels/launch.h"
#include "tests/fuzz/problem.h"

namespace anyflash::emulated {

// What the GPU kernels compute with: probabilities enter the second product in the storage type,
// exponentials are ex2.approx, and so are softcaps to 256, by way of a sigmoid. Rows far from 0 are
// looked at with a bias alone.
inline reference::Arithmetic arithmetic_of(Dtype dtype, const AttentionParams& params) {
  reference::Arithmetic arithmetic{dtype, 1.0 / 2048, 1e-6, 0x1p-25};
  if (dtype == Dtype::bf16) arithmetic = {dtype, 1.0 / 256, 1e-6};
  if (params.softcap <= 256) arithmetic.cap_error = 0x1p-22;
  if (!params.bias) arithmetic.far_lse = reference::kInfinity;
  return arithmetic;
}

// Copies of a problem's buffers and of its results in `Memory`, which has allocate, release,
// copy_in and copy_out. Lives as long as the kernel runs.
template <class Memory>
class Transfer {
 public:
  Transfer(const fuzz::Problem& problem, fuzz::Results& results) : params_(problem.with(results)) {
    for (const fuzz::Guarded& input : problem.inputs()) copy_in(input);
    for (const fuzz::Guarded* result : all_of(results)) copy_in(*result);
    move(params_.q.data);
    move(params_.k.data);
    move(params_.v.data);
    move(params_.out.data);
    move(params_.lse.data);
    move(params_.cu_seqlens_q);
    move(params_.cu_seqlens_k);
    move(params_.seqused_k);
    move(params_.leftpad_k);
    move(params_.block_table);
    move(params_.alibi_slopes);
    move(params_.sinks);
    move(params_.bias);
    move(params_.rng_state);
    move(params_.dout.data);
    move(params_.dlse.data);
    move(params_.dq.data);
    move(params_.dk.data);
    move(params_.dv.data);
    move(params_.dbias);
    move(params_.dsinks);
  }
  Transfer(const Transfer&) = delete;
  Transfer& operator=(const Transfer&) = delete;
  ~Transfer() {
    for (const Copy& copy : copies_) Memory::release(copy.data);
    if (workspace_) Memory::release(workspace_);
  }

  // Runs the instance and brings the results back.
  int32_t run(const Instance* instance, bool deterministic, fuzz::Results& results) {
    params_.deterministic = deterministic;
    const int64_t bytes = anyflash_attention_workspace(instance, &params_);
    if (bytes > 0) params_.workspace = workspace_ = Memory::allocate(bytes);
    const int32_t error = anyflash_launch(instance, &params_, nullptr);
    for (const fuzz::Guarded* result : all_of(results)) {
      for (const Copy& copy : copies_) {
        if (copy.host == result->as()) Memory::copy_out(copy.host, copy.data, copy.bytes);
      }
    }
    return error;
  }

 private:
  static std::vector<const fuzz::Guarded*> all_of(const fuzz::Results& x) {
    return {&x.out, &x.lse, &x.dq, &x.dk, &x.dv, &x.dbias, &x.dsinks};
  }

  struct Copy {
    char* host;
    void* data;
    int64_t bytes;
  };

  void copy_in(const fuzz::Guarded& buffer) {
    if (buffer.bytes() == 0) return;
    copies_.push_back({buffer.as<char>(), Memory::allocate(buffer.bytes()), buffer.bytes()});
    Memory::copy_in(copies_.back().data, buffer.as(), buffer.bytes());
  }

  // To the same place in the copy. Pointers to nothing stay: guard pages of the host.
  template <class T>
  void move(T*& pointer) const {
    const char* at = reinterpret_cast<const char*>(pointer);
    for (const Copy& copy : copies_) {
      if (at < copy.host || at >= copy.host + copy.bytes) continue;
      pointer = reinterpret_cast<T*>(static_cast<char*>(copy.data) + (at - copy.host));
      return;
    }
  }

  AttentionParams params_;
  std::vector<Copy> copies_;
  void* workspace_ = nullptr;
};

// The GPU instances of attention whose name contains `filter`.
inline std::vector<const Instance*> instances(const std::string& filter) {
  int32_t count = 0;
  const Instance* all = anyflash_instances(&count);
  std::vector<const Instance*> found;
  for (const Instance* instance = all; instance < all + count; ++instance) {
    if (instance->family == Family::attention && instance->device == Device::cuda &&
        std::string(instance->name).find(filter) != std::string::npos) {
      found.push_back(instance);
    }
  }
  return found;
}

}  // namespace anyflash::emulated
