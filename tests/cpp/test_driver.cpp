#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "catch.h"
#include "fake_driver.h"
#include "kernels/common/launch_kernel.h"
#include "kernels/cubin.h"
#include "kernels/launch.h"

using anyflash::Cubin;
using anyflash::device_limits;
using anyflash::GpuKernel;
using anyflash::Grid;
using anyflash::launch_on_device;
using anyflash::driver::error_text;

namespace attribute = anyflash::driver::attribute;

namespace {

using Strings = std::vector<std::string>;

fake_driver::State& fake = fake_driver::fake_driver_state();

template <size_t Size>
constexpr Cubin cubin(int32_t sm, const char (&image)[Size]) {
  return {sm, 12000, image, Size};
}

constexpr char kImage75[] = "sm_75 forward combine", kImage80[] = "sm_80 forward combine",
               kImage90[] = "sm_90 forward combine";
constexpr Cubin kAll[] = {cubin(75, kImage75), cubin(80, kImage80), cubin(90, kImage90), {}};
constexpr GpuKernel kForward{"forward", kAll};
constexpr GpuKernel kCombine{"combine", kAll};

unsigned long long new_id() {
  static unsigned long long last = 0;
  return ++last;
}

void forget() {
  fake.errors.clear();
  fake.calls.clear();
  fake.loads.clear();
  fake.functions.clear();
  fake.shared_bytes.clear();
  fake.capture_modes.clear();
  fake.launches.clear();
}

// A context that was never used, on a device that was never used, current in this thread.
struct NewContext {
  explicit NewContext(int32_t sm = 80) : record{int32_t(fake.devices.size()), new_id()} {
    fake.devices.push_back({{attribute::major, sm / 10}, {attribute::minor, sm % 10}});
    cuCtxSetCurrent(&record);
    forget();
  }
  ~NewContext() { cuCtxSetCurrent(nullptr); }

  fake_driver::ContextRecord record;
};

int32_t launch(const GpuKernel& kernel = kForward, uint32_t shared_bytes = 0) {
  char argument = 0;
  void* arguments[] = {&argument};
  return launch_on_device(&kernel, {1, 1, 32, shared_bytes}, arguments, nullptr);
}

void in_thread(void (*run)()) { std::thread(run).join(); }

Strings images() {
  Strings found;
  for (const fake_driver::Load& load : fake.loads) found.push_back(load.image);
  return found;
}

std::string output(const std::string& command) {
  std::string text;
  std::FILE* pipe = popen(command.c_str(), "r");
  for (int c; (c = std::fgetc(pipe)) != EOF;) text += char(c);
  pclose(pipe);
  return text;
}

}  // namespace

TEST_CASE("driver: one that will not do is an error with a text", "[driver]") {
  const char* const old =
      "11080 -5 the NVIDIA driver is too old: it knows CUDA 11.8, these kernels need 12.0 (driver "
      "R525) or newer";
  const struct {
    const char* library;
    const char* version_and_init;
    const char* expected;
  } kCases[] = {
      {"without_nothing", "11080 0", old},
      {"without_nothing", "12040 100", "0 100 cuInit: there is no GPU (CUDA_ERROR_NO_DEVICE, 100)"},
      {"without_nothing", "12040 999", "0 999 cuInit: an unknown error (CUresult, 999)"},
      {"without_cuInit", "11080 0", "0 -2 libcuda.so.1 is no driver of NVIDIA's: it has no cuInit"},
      {"without_cuLaunchKernel", "12000 0",
       "0 -2 libcuda.so.1 is no driver of NVIDIA's: it has no cuLaunchKernel"},
      {"without_cuLaunchKernel", "11080 0", old},
  };
  for (const auto& [library, version_and_init, expected] : kCases) {
    const std::string path = std::string(FAKE_DRIVERS) + library + "/libcuda.so.1";
    CHECK(output("'" DRIVER_PROBE "' '" + path + "' " + version_and_init) == expected);
  }
}

TEST_CASE("driver: version and compute capability", "[driver]") {
  const NewContext context(86);
  CHECK(anyflash::driver::version() == 12040);
  CHECK(anyflash::driver::device_sm(context.record.device) == 86);
  CHECK(anyflash::driver::device_sm(1000) == 0);
}

// ---- contexts and modules ----

TEST_CASE("driver: a thread without a context gets the primary one of device 0", "[driver]") {
  const NewContext other;
  const auto retained = [] {
    return std::count(fake.calls.begin(), fake.calls.end(), "cuDevicePrimaryCtxRetain");
  };
  CHECK(launch() == 0);
  CHECK(retained() == 0);
  REQUIRE(fake.loads.size() == 1);
  CHECK(fake.loads[0].context == other.record.id);
  in_thread([] {
    CHECK(launch() == 0);
    CHECK(launch() == 0);
  });
  CHECK(retained() == 1);
  REQUIRE(fake.loads.size() == 2);
  CHECK(fake.loads[1].context == fake_driver::kPrimaryIds);
}

TEST_CASE("driver: a module is loaded once in a context, also by many threads", "[driver]") {
  NewContext context;
  std::vector<std::thread> threads;
  std::array<int32_t, 8> errors;
  for (int32_t& error : errors) {
    threads.emplace_back([&] {
      cuCtxSetCurrent(&context.record);
      error = launch() != 0 ? 1 : launch(kCombine);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(errors == std::array<int32_t, 8>{});
  CHECK(fake.launches.size() == 16);
  CHECK(images() == Strings{kImage80});
  CHECK(fake.functions.size() == 2);

  context.record.id = new_id();  // another one, at the address of the first
  CHECK(launch() == 0);
  CHECK(images() == Strings{kImage80, kImage80});
  CHECK(fake.functions.size() == 3);
}

TEST_CASE("driver: the newest code that runs on the device is loaded", "[driver]") {
  const char image_86[] = "sm_86 forward";
  const Cubin only_80[] = {cubin(80, kImage80), {}};
  const Cubin up_to_86[] = {cubin(80, kImage80), cubin(86, image_86), {}};
  const struct {
    const Cubin* cubins;
    int32_t sm;
    Strings expected;
  } kCases[] = {
      {kAll, 75, {kImage75}},
      {kAll, 80, {kImage80}},
      {kAll, 86, {kImage80}},
      {kAll, 90, {kImage90}},
      {kAll, 100, {}},
      {only_80, 89, {kImage80}},
      {only_80, 75, {}},
      {only_80, 90, {}},
      {up_to_86, 80, {kImage80}},
      {up_to_86, 86, {image_86}},
      {up_to_86, 89, {image_86}},
  };
  for (const auto& [cubins, sm, expected] : kCases) {
    CAPTURE(cubins->sm, sm);
    const NewContext context(sm);
    const int32_t error = launch({"forward", cubins});
    CHECK(images() == expected);
    CHECK(error == (expected.empty() ? anyflash::kErrorNoCode : 0));
    if (error == 0) continue;
    CHECK(error_text(error) == "no machine code for sm_" + std::to_string(sm) + " of forward");
  }
}

TEST_CASE("driver: code that differs from another's in a few bytes", "[driver]") {
  const NewContext context;
  const uint32_t changes[] = {0 << 8 | 'S', 4 << 8 | '1', 20 << 8 | 'N'};
  const Cubin cubins[] = {{80, 12000, kImage80, sizeof kImage80, changes, 3}, {}};
  CHECK(launch({"forward", cubins}) == 0);
  CHECK(images() == Strings{"Sm_81 forward combinN"});
  CHECK(launch() == 0);
  CHECK(fake.loads[1].image == kImage80);
}

TEST_CASE("driver: what it refuses has its text, and is asked for again", "[driver]") {
  const NewContext context(86);
  const auto refused = [](const char* function, int32_t code, const GpuKernel& kernel) {
    fake.errors[function] = code;
    const int32_t error = launch(kernel, 64 << 10);
    fake.errors.clear();
    CHECK(error == code);
    return std::string(error_text(error));
  };
  const std::string no_binary =
      ": no kernel image is available (CUDA_ERROR_NO_BINARY_FOR_GPU, 209)";
  CHECK(refused("cuModuleLoadData", 209, kForward) ==
        "on sm_86 the driver refuses the sm_80 code of forward" + no_binary);
  CHECK(refused("cuModuleGetFunction", 209, kForward) == "no kernel forward" + no_binary);
  CHECK(refused("cuFuncSetAttribute", 209, kForward) == "shared memory of forward" + no_binary);
  CHECK(refused("cuLaunchKernel", 209, kForward) == "the launch of forward" + no_binary);
  CHECK(refused("", 500, {"backward", kAll}) ==
        "no kernel backward: an unknown error (CUresult, 500)");
  CHECK(images() == Strings{kImage80});
  CHECK(fake.shared_bytes.size() == 1);
  CHECK(launch() == 0);
}

TEST_CASE("driver: a load relaxes the capture of graphs and puts it back", "[driver]") {
  const NewContext context;
  int32_t mode = 1;
  cuThreadExchangeStreamCaptureMode(&mode);
  for (const int32_t error : {209, 0}) {
    forget();
    fake.errors["cuModuleLoadData"] = error;
    CHECK(launch() == error);
    CHECK(fake.capture_modes == std::vector<int32_t>{anyflash::driver::kCaptureRelaxed, 1});
  }
  CHECK(fake.loads.at(0).capture_mode == anyflash::driver::kCaptureRelaxed);
  cuThreadExchangeStreamCaptureMode(&mode);
}

// ---- launches ----

TEST_CASE("driver: a launch has the caller's grid, stream and argument", "[driver]") {
  const NewContext context;
  const struct {
    const void* pointer;
    int64_t length;
    double scale;
  } params = {&context, int64_t{1} << 40, 0.5};
  fake.argument_bytes = sizeof params;
  int stream = 0;
  auto copy = params;
  void* arguments[] = {&copy};
  CHECK(launch_on_device(&kCombine, {3, 5, 128, 1024}, arguments, &stream) == 0);
  fake.argument_bytes = 0;
  REQUIRE(fake.launches.size() == 1);
  const fake_driver::Launch& launched = fake.launches[0];
  CHECK(launched.kernel == "combine");
  CHECK(launched.grid == std::vector<unsigned>{3, 5, 1});
  CHECK(launched.block == std::vector<unsigned>{128, 1, 1});
  CHECK(launched.shared_bytes == 1024);
  CHECK(launched.stream == &stream);
  REQUIRE(launched.arguments.size() == sizeof params);
  CHECK(std::memcmp(launched.arguments.data(), &params, sizeof params) == 0);
}

TEST_CASE("driver: a second launch is a launch and nothing else", "[driver]") {
  const NewContext context;
  CHECK(launch(kForward, 64 << 10) == 0);
  forget();
  CHECK(launch(kForward, 64 << 10) == 0);
  CHECK(fake.calls == Strings{"cuCtxGetCurrent", "cuCtxGetId", "cuLaunchKernel"});
}

TEST_CASE("driver: more than 48 KB of shared memory are asked for when they grow", "[driver]") {
  NewContext context;
  const auto asked_for = [](const GpuKernel& kernel, uint32_t kilobytes) {
    fake.shared_bytes.clear();
    CHECK(launch(kernel, kilobytes << 10) == 0);
    Strings asked;
    for (const auto& [name, bytes] : fake.shared_bytes) {
      asked.push_back(name + " " + std::to_string(bytes));
    }
    return asked;
  };
  CHECK(asked_for(kForward, 48) == Strings{});
  CHECK(asked_for(kForward, 64) == Strings{"forward 65536"});
  CHECK(asked_for(kForward, 64) == Strings{});
  CHECK(asked_for(kForward, 96) == Strings{"forward 98304"});
  CHECK(asked_for(kForward, 64) == Strings{});
  CHECK(asked_for(kCombine, 64) == Strings{"combine 65536"});
  context.record.id = new_id();
  CHECK(asked_for(kForward, 64) == Strings{"forward 65536"});
}

// ---- what a device has, and what went wrong ----

TEST_CASE("driver: limits are those of the current device, asked for once", "[driver]") {
  for (const int32_t times : {1, 2}) {
    const NewContext context(80 + times);
    CHECK(device_limits().sm == 0);  // it does not tell all yet
    CHECK(device_limits().shared_bytes_per_block == 48 << 10);
    fake.devices[context.record.device].insert({
        {attribute::multiprocessors, 108 * times},
        {attribute::l2_bytes, times << 20},
        {attribute::shared_bytes_per_multiprocessor, 164 << 10},
        {attribute::shared_bytes_per_block, 163 << 10},
    });
    for (const bool again : {false, true}) {
      forget();
      const anyflash::DeviceLimits limits = device_limits();
      CHECK(limits.sm == 80 + times);
      CHECK(limits.multiprocessors == 108 * times);
      CHECK(limits.l2_bytes == times << 20);
      CHECK(limits.shared_bytes_per_multiprocessor == 164 << 10);
      CHECK(limits.shared_bytes_per_block == 163 << 10);
      CHECK((fake.calls == Strings{"cuCtxGetCurrent", "cuCtxGetDevice"}) == again);
    }
  }
}

TEST_CASE("driver: the text of an error is of the thread that got it", "[driver]") {
  const NewContext context(100);
  CHECK(launch() == anyflash::kErrorNoCode);
  in_thread([] {
    const NewContext newer(120);
    CHECK(std::string(error_text(fake_driver::kNoDevice)) == "there is no GPU");
    CHECK_THAT(error_text(anyflash::kErrorNoCode), !ContainsSubstring("sm_100"));
    CHECK(launch() == anyflash::kErrorNoCode);
    CHECK_THAT(error_text(anyflash::kErrorNoCode), ContainsSubstring("sm_120"));
  });
  CHECK_THAT(error_text(anyflash::kErrorNoCode), ContainsSubstring("sm_100"));
}
