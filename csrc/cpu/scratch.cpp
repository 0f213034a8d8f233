// Memory that a thread of the pool keeps from call to call: it grows to the largest block ever expanded and no further.
#include <cstdlib>
#include <memory>

#include "expand.h"

namespace calora {

uint8_t* expanded_block(int64_t bytes) {
  struct Free { void operator()(uint8_t* p) const { std::free(p); } };
  static thread_local std::unique_ptr<uint8_t, Free> buffer;
  static thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    buffer.reset(static_cast<uint8_t*>(std::aligned_alloc(kTileAlign, static_cast<std::size_t>(round_up(bytes, 4096)))));
    if (!buffer) std::abort();  // a few megabytes are gone: nothing can be told from inside a parallel region
    capacity = bytes;
  }
  return buffer.get();
}

}  // namespace calora
