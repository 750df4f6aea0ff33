// Memory between two pages that nobody may touch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

namespace anyflash::fuzz {

class Guarded {
 public:
  Guarded() = default;

  // Flush with the end: a read one byte behind the data faults; else one byte before it.
  Guarded(int64_t bytes, bool flush_with_end) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inside = (bytes + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    base_ = static_cast<char*>(
        mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    inside_ = base_ + page;
    if (inside > 0 && mprotect(inside_, inside, PROT_READ | PROT_WRITE) != 0)
      throw std::bad_alloc();
    data_ = flush_with_end ? inside_ + inside - bytes : inside_;
  }
  Guarded(Guarded&& other) noexcept { swap(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Guarded() {
    if (base_) munmap(base_, mapped_);
  }

  // From now on a write faults.
  void make_read_only() {
    const int64_t page = sysconf(_SC_PAGESIZE);
    if (base_ && mapped_ > 2 * page) mprotect(inside_, mapped_ - 2 * page, PROT_READ);
  }

  template <class T = void>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }
  explicit operator bool() const { return base_ != nullptr; }

  bool operator==(const Guarded& other) const {
    return bytes_ == other.bytes_ && (bytes_ == 0 || std::memcmp(data_, other.data_, bytes_) == 0);
  }

 private:
  void swap(Guarded& other) {
    std::swap(base_, other.base_);
    std::swap(inside_, other.inside_);
    std::swap(data_, other.data_);
    std::swap(mapped_, other.mapped_);
    std::swap(bytes_, other.bytes_);
  }

  char* base_ = nullptr;
  char* inside_ = nullptr;
  char* data_ = nullptr;
  int64_t mapped_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace anyflash::fuzz
