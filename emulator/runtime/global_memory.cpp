#include "emulator/runtime/global_memory.h"

#include <memory>
#include <unordered_map>

#include "emulator/runtime/buffers.h"
#include "emulator/runtime/report.h"

namespace emu {

namespace {

// Writes are remembered by words, reads, which are many, by 16 bytes.
constexpr uint64_t kWordBytes = 4;
constexpr uint64_t kChunkBytes = 16;

struct Touch {
  Clock clock;
  uint16_t actor;
  uint16_t mask;  // bytes of the chunk
};

struct Write {
  Touch touch;
  bool atomic;
};

// The last two by different actors of this block (whoever writes next is not both) and the last one
// by an earlier block.
struct Reads {
  Touch last, other, earlier_block;
  uint16_t mask;  // all bytes that this block has read
};

struct Page {
  const Allocation* allocation;  // null for memory that is not a Buffer's
  Clock last_write;
  Write writes[kPageBytes / kWordBytes];
  Reads reads[kPageBytes / kChunkBytes];
};

std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;  // by address / kPageBytes

struct CachedPage {
  uint64_t number;
  Page* page;
};
CachedPage cache[64];
CachedPage& cached(uint64_t number) { return cache[number % 64]; }

Page& page_of(uint64_t address) {
  const uint64_t number = address / kPageBytes;
  CachedPage& recent = cached(number);
  if (recent.page && recent.number == number) return *recent.page;
  std::unique_ptr<Page>& page = pages[number];
  if (!page) {
    page = std::make_unique<Page>();
    page->allocation = find_allocation(address);
  }
  recent = {number, page.get()};
  return *page;
}

const char* name(Access access) {
  return access == Access::read ? "read" : access == Access::write ? "write" : "atomic access";
}

void report_race(const Touch& earlier, uint64_t address, Access access, bool was_write,
                 const void* site) {
  if (earlier.clock <= block.epoch) {
    report("global-race", site, "%s of %s, which another block %s in this launch", name(access),
           place(address).c_str(), was_write ? "wrote" : "read");
  } else {
    report("global-race", site, "%s of %s not ordered after the %s by %s", name(access),
           place(address).c_str(), was_write ? "write" : "read",
           block.actor_name(earlier.actor).c_str());
  }
}

bool conflicts(const Touch& earlier, const Touch& now, const Actor& actor) {
  if (earlier.clock <= block.launch_epoch || !(earlier.mask & now.mask)) return false;
  return earlier.clock <= block.epoch || !actor.is_after(earlier.actor, earlier.clock);
}

void remember(Reads& reads, const Touch& now) {
  if (reads.last.clock <= block.epoch) {  // the first of this block
    reads.earlier_block = reads.last;
    reads.earlier_block.mask = reads.mask;
    reads.other = {};
    reads.mask = 0;
  } else if (reads.last.actor != now.actor) {
    reads.other = reads.last;
  }
  reads.last = now;
  reads.mask |= now.mask;
}

// Calls visit(write, address) for the words that an access within one chunk touches.
template <typename Visit>
void for_each_word(Page& page, uint64_t address, uint32_t bytes, Visit&& visit) {
  const uint64_t first = address % kPageBytes / kWordBytes;
  const uint64_t last = (address + bytes - 1) % kPageBytes / kWordBytes;
  for (uint64_t i = first; i <= last; ++i) {
    visit(page.writes[i], address / kPageBytes * kPageBytes + i * kWordBytes);
  }
}

void track(Page& page, uint64_t address, uint32_t bytes, Access access, const Actor& actor,
           const void* site) {
  const uint16_t mask = uint16_t(((1u << bytes) - 1) << address % kChunkBytes);
  const Touch now = {actor.now(), uint16_t(actor.index), mask};
  const bool atomic = access == Access::atomic;
  if (access != Access::read || page.last_write > block.launch_epoch) {
    for_each_word(page, address, bytes, [&](const Write& write, uint64_t word) {
      if (atomic && write.atomic) return;
      if (conflicts(write.touch, now, actor)) report_race(write.touch, word, access, true, site);
    });
  }
  Reads& reads = page.reads[address % kPageBytes / kChunkBytes];
  if (access == Access::read) return remember(reads, now);
  for (const Touch* read : {&reads.last, &reads.other, &reads.earlier_block}) {
    if (conflicts(*read, now, actor)) report_race(*read, address, access, false, site);
  }
  for_each_word(page, address, bytes, [&](Write& write, uint64_t) { write = {now, atomic}; });
  page.last_write = now.clock;
}

void check_bounds(const Page& page, uint64_t address, uint32_t bytes, Access access,
                  const void* site) {
  const Allocation* buffer = page.allocation;
  if (!buffer || (address >= buffer->begin && address + bytes <= buffer->end)) return;
  EMU_FAIL("out-of-bounds", site, "%s of %u bytes at %s", name(access), bytes,
           place(address).c_str());
}

}  // namespace

const void* last_global_site;

void track_global(uint64_t address, uint32_t bytes, Access access, const Actor& actor,
                  const void* site) {
  last_global_site = site;
  const uint32_t in_chunk = uint32_t(kChunkBytes - address % kChunkBytes);
  if (bytes > in_chunk) {  // misaligned, as the rows of a bulk copy may be
    track_global(address, in_chunk, access, actor, site);
    return track_global(address + in_chunk, bytes - in_chunk, access, actor, site);
  }
  Page& page = page_of(address);
  check_bounds(page, address, bytes, access, site);
  if (current_options.check) track(page, address, bytes, access, actor, site);
}

bool is_written_in_launch(uint64_t address) {
  const Write& write = page_of(address).writes[address % kPageBytes / kWordBytes];
  return write.touch.clock > block.launch_epoch;
}

void forget_accesses(uint64_t begin, uint64_t end) {
  for (uint64_t number = begin / kPageBytes; number < end / kPageBytes; ++number) {
    pages.erase(number);
    cached(number).page = nullptr;
  }
}

void forget_all_accesses() {
  pages.clear();
  for (CachedPage& cached : cache) cached.page = nullptr;
}

}  // namespace emu
