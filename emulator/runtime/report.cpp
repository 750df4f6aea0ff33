#include "emulator/runtime/report.h"

#include <cxxabi.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <utility>

#include "emulator/runtime/block.h"

namespace emu {

Result result;

namespace {

// Reports by kind and place: by address, which is fast, and by source line, because loops are
// unrolled.
template <typename Place>
using Index = std::map<std::pair<const char*, Place>, size_t>;
Index<const void*> by_address;
Index<std::string> by_line;

std::string printed(const char* format, va_list arguments) {
  char text[1024];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

}  // namespace

std::string short_name(const char* mangled) {
  char* demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
  std::string name = demangled ? demangled : mangled;
  std::free(demangled);
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);
  if (!name.empty() && name.back() == ')') {  // its parameters
    int depth = 0;
    size_t i = name.size();
    do {
      --i;
      depth += name[i] == ')' ? 1 : name[i] == '(' ? -1 : 0;
    } while (i > 0 && depth > 0);
    name.erase(i);
  }
  return name;
}

void report(const char* kind, const void* site, const char* format, ...) {
  const size_t next = result.reports.size();
  const auto known = by_address.find({kind, site});
  if (known != by_address.end()) {
    if (known->second < next) ++result.reports[known->second].count;
    return;
  }
  const std::string where = site ? source_lines(site) : "";
  const size_t index =
      where.empty() ? next : by_line.try_emplace({kind, where}, next).first->second;
  by_address[{kind, site}] = index;
  if (index < next) {
    ++result.reports[index].count;
    return;
  }
  if (next >= current_options.max_reports) return;
  va_list arguments;
  va_start(arguments, format);
  const std::string text = printed(format, arguments);
  va_end(arguments);
  result.reports.push_back(
      {kind, text, short_name(block.kernel_name), regs.ctaid, self ? self->index : -1, where, 1});
}

bool Result::has(const char* kind) const {
  for (const Report& report : reports) {
    if (report.kind == kind) return true;
  }
  return false;
}

std::string Result::text() const {
  std::string all;
  for (const Report& report : reports) {
    char head[256];
    snprintf(head, sizeof head, "[%s] %lu times, first by block (%u, %u, %u) thread %d\n",
             report.kind.c_str(), static_cast<unsigned long>(report.count), report.block.x,
             report.block.y, report.block.z, report.thread);
    all += head + ("  " + report.text) + "\n  in " + report.kernel;
    all += report.where.empty() ? "\n" : " at " + report.where + "\n";
  }
  return all;
}

Result take_result() {
  by_address.clear();
  by_line.clear();
  return std::exchange(result, {});
}

}  // namespace emu
