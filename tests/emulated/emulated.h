// CUDA's device language on the CPU. The threads of a block are fibers that take turns at barriers;
// blocks run one after the other. Which fiber begins changes from block to block, and shared memory
// is filled with NaN before each, so that a missing barrier or initialisation shows.
#pragma once

#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("pk_shared")))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" {
// The linker names the ends of a section, if there is any variable in it.
extern char __start_pk_shared[] __attribute__((weak));
extern char __stop_pk_shared[] __attribute__((weak));
}

namespace emulated {

// A kernel's arguments alone may take 32 kB.
constexpr size_t stack_size = 1 << 18;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[32];
};

struct Block {
  std::vector<ucontext_t> fibers;
  std::vector<bool> done;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> stacks;
  ucontext_t scheduler;
  Barrier barrier;
  unsigned live = 0, current = 0;
  bool progress = false;
  void (*body)(const void*) = nullptr;
  const void* data = nullptr;
};
inline Block* block = nullptr;

inline void fail(const char* why) {
  std::fprintf(stderr, "emulated kernel: %s\n", why);
  std::abort();
}

inline void yield() { swapcontext(&block->fibers[block->current], &block->scheduler); }

inline void release(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
  block->progress = true;
}

inline void wait(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) return release(barrier);
  while (barrier.generation == generation) yield();
}

inline void enter() {
  block->body(block->data);
  block->done[block->current] = true;
  block->progress = true;
  // Threads that have returned are waited for no longer.
  if (--block->live != 0 && block->barrier.arrived == block->live) release(block->barrier);
}

template <class Body>
void run_block(unsigned threads, const Body& body, bool backward) {
  Block now;
  block = &now;
  if (__start_pk_shared)
    std::memset(__start_pk_shared, 0xff, size_t(__stop_pk_shared - __start_pk_shared));
  now.fibers.resize(threads);
  now.done.assign(threads, false);
  now.warps.resize((threads + 31) / 32);
  now.stacks.reset(new char[threads * stack_size]);
  now.live = threads;
  now.body = [](const void* data) { (*static_cast<const Body*>(data))(); };
  now.data = &body;
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&now.fibers[t]);
    now.fibers[t].uc_stack.ss_sp = &now.stacks[t * stack_size];
    now.fibers[t].uc_stack.ss_size = stack_size;
    now.fibers[t].uc_link = &now.scheduler;
    makecontext(&now.fibers[t], enter, 0);
  }
  while (now.live) {
    now.progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned t = backward ? threads - 1 - i : i;
      if (now.done[t]) continue;
      now.current = t;
      threadIdx = dim3(t);
      swapcontext(&now.scheduler, &now.fibers[t]);
    }
    if (!now.progress) fail("threads wait for each other");
  }
  block = nullptr;
}

template <class Body>
void run(dim3 blocks, unsigned threads, const Body& body) {
  if (threads % 32 || threads > 1024) fail("a block has 32 to 1024 threads, in whole warps");
  if (blocks.y > 65535 || blocks.z > 65535 || !blocks.x || !blocks.y || !blocks.z)
    fail("no such grid");
  gridDim = blocks;
  blockDim = dim3(threads);
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(threads, body, (x + y + z) % 2);
      }
}

// What `read` makes of every lane's value.
template <class V, class Read>
auto exchanged(unsigned mask, V value, const Read& read) {
  static_assert(sizeof(V) <= 8);
  if (mask != 0xffffffff) fail("all lanes take part in an exchange");
  Warp& warp = block->warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(&warp.slots[lane], &value, sizeof value);
  wait(warp.barrier, 32);
  // The fiber may have been resumed: threadIdx is its own again.
  V values[32];
  for (int i = 0; i < 32; ++i) std::memcpy(&values[i], &warp.slots[i], sizeof value);
  const auto result = read(values, lane);
  wait(warp.barrier, 32);
  return result;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::block->barrier, emulated::block->live); }
template <class V>
V __shfl_sync(unsigned mask, V value, int from) {
  return emulated::exchanged(mask, value, [&](const V* v, unsigned) { return v[from & 31]; });
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int bits) {
  return emulated::exchanged(mask, value, [&](const V* v, unsigned l) { return v[l ^ bits]; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulated::exchanged(mask, predicate, [](const int* v, unsigned) {
    unsigned found = 0;
    for (int i = 0; i < 32; ++i) found |= unsigned(v[i] != 0) << i;
    return found;
  });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulated::exchanged(mask, value, [](const unsigned* v, unsigned) {
    unsigned sum = 0;
    for (int i = 0; i < 32; ++i) sum += v[i];
    return sum;
  });
}
inline unsigned atomicOr(unsigned* at, unsigned bits) {
  const unsigned old = *at;
  *at |= bits;
  return old;
}

using std::fma;
using std::sqrt;
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(unsigned bits) { return bits ? std::countr_zero(bits) + 1 : 0; }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
