// A libcuda.so.1 without a GPU: tests set what it answers and read what
// it was asked.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/driver.h"

struct anyflash::driver::ContextRecord {
  int32_t device;
  unsigned long long id;
};

namespace fake_driver {

using anyflash::driver::ContextRecord;

// An image is a text that ends with a null byte and has the names of its kernels.
struct Load {
  std::string image;
  unsigned long long context;
  int32_t capture_mode;
};

struct SharedBytes {
  std::string kernel;
  int32_t bytes;
};

struct Launch {
  std::string kernel;
  std::vector<unsigned> grid;
  std::vector<unsigned> block;
  unsigned shared_bytes;
  void* stream;
  std::string arguments;  // the bytes of the one struct
};

struct State {
  int version = 12040;
  std::map<std::string, int> errors;            // by function: what it fails with
  std::vector<std::map<int32_t, int>> devices;  // CUdevice_attribute to value
  std::map<int32_t, ContextRecord> primary;     // by device, once retained
  size_t argument_bytes = 0;                    // of every kernel

  std::mutex mutex;                // of what it was asked:
  std::vector<std::string> calls;  // names of functions
  std::vector<Load> loads;
  std::vector<std::string> functions;  // looked up
  std::vector<SharedBytes> shared_bytes;
  std::vector<int32_t> capture_modes;  // that threads asked for
  std::vector<Launch> launches;
};

constexpr unsigned long long kPrimaryIds = 1000;

// The codes that it has a name and a text for.
constexpr int32_t kNoDevice = 100;
constexpr int32_t kNoBinary = 209;

extern "C" __attribute__((visibility("default"))) State& fake_driver_state();

}  // namespace fake_driver

// What tests call as the CUDA runtime would.
extern "C" int cuCtxSetCurrent(anyflash::driver::Context);
extern "C" int cuThreadExchangeStreamCaptureMode(int32_t*);
