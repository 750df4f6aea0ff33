// Source lines of code addresses: addr2line, one process per library, which reads the debug
// information once and is then asked address by address.
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <memory>
#include <unordered_map>

#include "emulator/runtime/report.h"

extern char** environ;

namespace emu {

namespace {

class Addr2line {
 public:
  explicit Addr2line(const std::string& file) {
    int questions[2];
    int answers[2];
    if (pipe2(questions, O_CLOEXEC) != 0 || pipe2(answers, O_CLOEXEC) != 0) return;
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, questions[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, answers[1], STDOUT_FILENO);
    // -a: every answer begins with its address, which tells where the answer before it ends.
    const char* command[] = {"addr2line", "-a", "-i", "-e", file.c_str(), nullptr};
    const int failed = posix_spawnp(&process_, command[0], &actions, nullptr,
                                    const_cast<char* const*>(command), environ);
    posix_spawn_file_actions_destroy(&actions);
    close(questions[0]);
    close(answers[1]);
    if (failed) return;
    questions_.reset(fdopen(questions[1], "w"));
    answers_.reset(fdopen(answers[0], "r"));
  }

  ~Addr2line() {
    if (!questions_) return;
    questions_.reset();  // the end of its input is its end
    waitpid(process_, nullptr, 0);
  }

  std::string ask(uintptr_t address) {
    if (!questions_) return "";
    fprintf(questions_.get(), "0x%lx\n0\n", static_cast<unsigned long>(address));
    fflush(questions_.get());
    std::string lines;
    char line[4096];
    int addresses = 0;
    while (fgets(line, sizeof line, answers_.get())) {
      if (line[0] == '0' && line[1] == 'x') {
        ++addresses;
        continue;
      }
      if (addresses == 2) break;  // the answer for address 0
      if (line[0] != '?') lines += (lines.empty() ? "" : " <- ") + tidy(line);
    }
    return lines;
  }

 private:
  // "/a/b/forward.cuh:12 (discriminator 3)\n" -> "forward.cuh:12"
  static std::string tidy(std::string line) {
    line.erase(line.find_first_of(" \n"));
    const size_t slash = line.rfind('/');
    return slash == std::string::npos ? line : line.substr(slash + 1);
  }

  struct Close {
    void operator()(FILE* file) const { fclose(file); }
  };
  pid_t process_ = 0;
  std::unique_ptr<FILE, Close> questions_;
  std::unique_ptr<FILE, Close> answers_;
};

struct Known {
  std::map<std::string, Addr2line> libraries;
  std::unordered_map<const void*, std::string> lines;
};

Known& known() {  // used by constructors of other files
  static Known all;
  return all;
}

std::string find(const void* site) {
  Dl_info info;
  if (!site || !dladdr(site, &info) || !info.dli_fbase) return "";
  const auto* image = static_cast<const ElfW(Ehdr)*>(info.dli_fbase);
  uintptr_t address = reinterpret_cast<uintptr_t>(site) - 1;  // in the call, not behind it
  if (image->e_type != ET_EXEC) address -= reinterpret_cast<uintptr_t>(image);
  const bool is_file = access(info.dli_fname, R_OK) == 0;  // the program's name may be any
  const std::string file = is_file ? info.dli_fname : "/proc/" + std::to_string(getpid()) + "/exe";
  return known().libraries.try_emplace(file, file).first->second.ask(address);
}

}  // namespace

const std::string& source_lines(const void* site) {
  const auto [entry, is_new] = known().lines.try_emplace(site);
  if (is_new) entry->second = find(site);
  return entry->second;
}

void forget_source_lines() {
  known().libraries.clear();
  known().lines.clear();
}

}  // namespace emu
