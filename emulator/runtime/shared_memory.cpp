#include "emulator/runtime/shared_memory.h"

#include <sys/mman.h>

#include <algorithm>

#include "emulator/runtime/report.h"

namespace emu {

namespace {

struct Word {
  Clock write_clock;
  uint16_t writer;
  uint8_t write_mask;   // bytes of the last write
  uint8_t initialised;  // bytes ever written
  uint8_t fills;        // copies under way that write it
  uint8_t drains;       // copies under way that read it
  bool async_proxy;     // the last writer's
  bool atomic;          // the last write was
};

// The last read by any lane of a warp (or by one of the engines).
struct Read {
  Clock clock;
  uint16_t reader;
  uint16_t mask;  // bytes
};

// Reads of whole chunks, which ldmatrix and the engines do, and of parts are kept apart: one entry
// for the former is much faster, entries by word are needed for the latter.
constexpr uint32_t kChunkBytes = 16;
struct ReadsOfGroup {
  std::vector<Read> chunks;
  std::vector<Read> words;
  bool has_words;  // in this block
};

struct ProxyFence {
  Clock own;                  // the thread's clock after its last fence
  std::vector<Clock> others;  // its vector clock at that fence, empty if there was none
};

unsigned char* allocate() {
  return static_cast<unsigned char*>(mmap(nullptr, kSharedWindowBytes, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

std::vector<Word> words;
std::vector<ReadsOfGroup> reads;  // a group is a warp, the last one the engines
std::vector<ProxyFence> fences;

int group_of(int actor) { return actor < block.num_threads ? actor / 32 : block.num_warps; }

const char* name(Access access) {
  return access == Access::read ? "read" : access == Access::write ? "write" : "atomic access";
}

// Did the writer of the word, or the actor's issuer after it knew of the write, fence?
bool is_fenced(const Word& word) {
  if (fences[word.writer].own > word.write_clock) return true;
  if (!self) return false;
  const ProxyFence& mine = fences[self->index];
  return !mine.others.empty() && mine.others[word.writer] >= word.write_clock;
}

void check_word(const Word& word, uint32_t index, uint8_t mask, Access access, const Actor& actor,
                Proxy proxy, const void* site) {
  const uint32_t at = index * 4;
  if (word.fills) {
    report("in-flight", site, "%s of shared byte %u while an asynchronous copy writes it",
           name(access), at);
  }
  if (word.drains && access != Access::read) {
    report("in-flight", site, "%s of shared byte %u while wgmma or a bulk store reads it",
           name(access), at);
  }
  const bool both_atomic = access == Access::atomic && word.atomic;
  if ((word.write_mask & mask) && !both_atomic && !actor.is_after(word.writer, word.write_clock)) {
    report(access == Access::read ? "race-RAW" : "race-WW", site,
           "%s of shared byte %u not ordered after the write by %s", name(access), at,
           block.actor_name(word.writer).c_str());
  }
  if (access != Access::write && (word.initialised & mask) != mask && !word.fills) {
    report("uninitialised", site, "%s of shared byte %u, which was never written", name(access),
           at);
  }
  if (proxy == Proxy::async && access == Access::read && (word.write_mask & mask) &&
      !word.async_proxy && word.writer < block.num_threads && !is_fenced(word)) {
    report("proxy-fence", site, "shared byte %u, written by %s, is read without fence.proxy.async",
           at, block.actor_name(word.writer).c_str());
  }
}

void check_reader(const Read& read, uint32_t at, uint8_t mask, const Actor& actor,
                  const void* site) {
  if (actor.is_after(read.reader, read.clock) || !(read.mask & mask)) return;
  report("race-WAR", site, "write of shared byte %u not ordered after the read by %s", at,
         block.actor_name(read.reader).c_str());
}

void check_readers(uint32_t offset, uint32_t bytes, const Actor& actor, const void* site) {
  for (const ReadsOfGroup& group : reads) {
    check_reader(group.chunks[offset / kChunkBytes], offset, 0xF, actor, site);
    if (!group.has_words) continue;
    for_each_word(offset, bytes, [&](uint32_t i, uint8_t mask) {
      check_reader(group.words[i], i * 4, mask, actor, site);
    });
  }
}

bool is_plain_read(const Word& word, uint8_t mask, const Actor& actor) {
  return !word.fills && (word.initialised & mask) == mask &&
         actor.is_after(word.writer, word.write_clock);
}

void track_read(uint32_t offset, uint32_t bytes, const Actor& actor, const void* site,
                Proxy proxy) {
  const Word* const shadow = words.data();
  for_each_word(offset, bytes, [&](uint32_t i, uint8_t mask) {
    if (proxy == Proxy::generic && is_plain_read(shadow[i], mask, actor)) return;
    check_word(shadow[i], i, mask, Access::read, actor, proxy, site);
  });
  ReadsOfGroup& group = reads[group_of(actor.index)];
  const Read read = {actor.now(), uint16_t(actor.index), 0xF};
  if (bytes == kChunkBytes) {
    group.chunks[offset / kChunkBytes] = read;
  } else {
    group.has_words = true;
    for_each_word(offset, bytes, [&](uint32_t i, uint8_t mask) {
      group.words[i] = {read.clock, read.reader, mask};
    });
  }
}

void track_write(uint32_t offset, uint32_t bytes, Access access, const Actor& actor,
                 const void* site, Proxy proxy) {
  check_readers(offset, bytes, actor, site);
  for_each_word(offset, bytes, [&](uint32_t i, uint8_t mask) {
    Word& word = words[i];
    check_word(word, i, mask, access, actor, proxy, site);
    word.write_clock = actor.now();
    word.writer = uint16_t(actor.index);
    word.write_mask = mask;
    word.initialised |= mask;
    word.async_proxy = proxy == Proxy::async;
    word.atomic = access == Access::atomic;
  });
}

}  // namespace

unsigned char* const shared_memory = allocate();

void track_shared(uint32_t offset, uint32_t bytes, Access access, const Actor& actor,
                  const void* site, Proxy proxy) {
  if (!current_options.check) return;
  if (access == Access::read) {
    track_read(offset, bytes, actor, site, proxy);
  } else {
    track_write(offset, bytes, access, actor, site, proxy);
  }
}

uint32_t shared_offset(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what,
                       const void* site) {
  if (address & (alignment - 1)) {
    EMU_FAIL("misaligned", site, "%s at shared address 0x%x, not a multiple of %u", what, address,
             alignment);
  }
  const uint32_t offset = address - kSharedBase;
  if (address < kSharedBase || offset + bytes > block.shared_bytes) {
    EMU_FAIL("out-of-bounds", site, "%s of %u bytes at shared byte %d of %u", what, bytes,
             int(offset), block.shared_bytes);
  }
  return offset;
}

void begin_fill(uint32_t offset, uint32_t bytes) {
  for (uint32_t i = offset / 4; i < (offset + bytes) / 4; ++i) ++words[i].fills;
  std::memset(shared_memory + offset, 0xFF, bytes);
}

void end_fill(uint32_t offset, const void* value, uint32_t bytes) {
  for (uint32_t i = offset / 4; i < (offset + bytes) / 4; ++i) --words[i].fills;
  std::memcpy(shared_memory + offset, value, bytes);
}

void end_fill_by(uint32_t offset, const void* value, uint32_t bytes, int actor, Clock time) {
  end_fill(offset, value, bytes);
  for (uint32_t i = offset / 4; i < (offset + bytes) / 4; ++i) {
    words[i].write_clock = time;
    words[i].writer = uint16_t(actor);
  }
}

void begin_drain(uint32_t offset, uint32_t bytes) {
  for (uint32_t i = offset / 4; i < (offset + bytes) / 4; ++i) ++words[i].drains;
}

void end_drain(uint32_t offset, uint32_t bytes) {
  for (uint32_t i = offset / 4; i < (offset + bytes) / 4; ++i) --words[i].drains;
}

void fence_proxy_async() {
  ProxyFence& fence = fences[self->index];
  fence.others.assign(self->clock, self->clock + block.num_actors);
  self->tick();
  fence.own = self->clock[self->index];
}

void shape_shared_memory() {
  const size_t num_chunks = (block.shared_bytes + kChunkBytes - 1) / kChunkBytes;
  const size_t num_words = num_chunks * kChunkBytes / 4;
  words.resize(num_words);
  reads.resize(block.num_warps + 1);
  for (ReadsOfGroup& group : reads) {
    group.chunks.assign(num_chunks, {});
    group.words.assign(num_words, {});
  }
  fences.resize(block.num_threads);
}

void begin_block_shared_memory() {
  std::fill(words.begin(), words.end(), Word{});
  std::fill(fences.begin(), fences.end(), ProxyFence{});
  for (ReadsOfGroup& group : reads) group.has_words = false;
  std::memset(shared_memory, 0xFF, block.shared_bytes);
}

}  // namespace emu
