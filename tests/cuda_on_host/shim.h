// CUDA kernels on the host: one fiber per thread, __syncthreads and shuffles by yielding, so that the very source of the
// kernels runs under the sanitizers of a host compiler and in any order of threads that we choose.
//
// A block runs alone. Its fibers are resumed round robin, forwards or backwards (host::reversed); a fiber that reaches a
// barrier yields until the others of its block, or of its warp, have arrived. Threads between two barriers thus run one
// after the other: a kernel that forgets a barrier gives different results in the two orders.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) char* const name = host::block->shared

using std::max;
using std::min;

struct Index { unsigned x; };
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr size_t kStack = 128 << 10;
constexpr int64_t kGuard = 256 << 10;  // bytes on either side of a block's shared memory that nothing may touch
constexpr unsigned kWarp = 32;

struct Barrier { unsigned arrived = 0, generation = 0; };

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<std::array<double, 2 * kWarp>> exchange;  // two sets of slots per warp: the next shuffle cannot overwrite the last
  Barrier all;
  unsigned current = 0;
  uint64_t progress = 0;  // barriers opened and threads finished
  char* shared = nullptr;
  ucontext_t main{};
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_size = 0;
  std::function<void()> body;
};

inline Block* block = nullptr;
inline bool reversed = false;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

inline void yield() {
  Fiber& fiber = block->fibers[block->current];
  __sanitizer_start_switch_fiber(&fiber.fake_stack, block->main_stack, block->main_size);
  swapcontext(&fiber.context, &block->main);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

inline void wait(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++block->progress;
  }
  while (barrier.generation == generation) yield();
}

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &block->main_stack, &block->main_size);
  block->body();
  Fiber& fiber = block->fibers[block->current];
  fiber.done = true;
  ++block->progress;
  __sanitizer_start_switch_fiber(nullptr, block->main_stack, block->main_size);
  swapcontext(&fiber.context, &block->main);
}

inline void run_block(Block& state, unsigned threads) {
  block = &state;
  state.all = {};
  state.warps.assign((threads + kWarp - 1) / kWarp, {});
  state.exchange.resize(state.warps.size());
  for (Fiber& fiber : state.fibers) {
    __asan_unpoison_memory_region(fiber.stack.get(), kStack);  // what the last block left
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
    fiber.context.uc_link = nullptr;
    fiber.fake_stack = nullptr;
    fiber.done = false;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (unsigned alive = threads; alive > 0;) {
    const uint64_t before = state.progress;
    for (unsigned k = 0; k < threads; ++k) {
      state.current = threadIdx.x = reversed ? threads - 1 - k : k;
      Fiber& fiber = state.fibers[state.current];
      if (fiber.done) continue;
      __sanitizer_start_switch_fiber(&state.main_fake_stack, fiber.stack.get(), kStack);
      swapcontext(&state.main, &fiber.context);
      __sanitizer_finish_switch_fiber(state.main_fake_stack, nullptr, nullptr);
      alive -= fiber.done;
    }
    if (state.progress == before) fail("deadlock: threads wait at a barrier that others never reach");
  }
}

}  // namespace host

inline void __syncthreads() { host::wait(host::block->all, blockDim.x); }

namespace spanet {

using half = _Float16;

struct bfloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(half x) { return x; }
inline float widen(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, half& out) { out = static_cast<half>(x); }
inline void narrow(float x, bfloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // round to nearest even; a NaN stays one
  out.bits = std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename T>
void widen_pair(uint32_t word, const T*, float* out) {
  T pair[2];
  std::memcpy(pair, &word, 4);
  out[0] = widen(pair[0]);
  out[1] = widen(pair[1]);
}
template <typename T>
uint32_t narrow_pair(const float* in, const T*) {
  T pair[2];
  narrow(in[0], pair[0]);
  narrow(in[1], pair[1]);
  uint32_t word;
  std::memcpy(&word, pair, 4);
  return word;
}

template <typename W>
void cos_sin_pi(W x, W* cosine, W* sine) {
  // exact at multiples of a half, like the device functions
  const double quarters = 2.0 * static_cast<double>(x), nearest = std::nearbyint(quarters), angle = (quarters - nearest) * M_PI_2;
  const double c = std::cos(angle), s = std::sin(angle);
  switch (static_cast<int>(nearest) & 3) {
    case 0: *cosine = static_cast<W>(c), *sine = static_cast<W>(s); break;
    case 1: *cosine = static_cast<W>(-s), *sine = static_cast<W>(c); break;
    case 2: *cosine = static_cast<W>(-c), *sine = static_cast<W>(-s); break;
    default: *cosine = static_cast<W>(s), *sine = static_cast<W>(-c);
  }
}

template <typename W>
W exchange(W value, int lane_mask) {
  host::Block& block = *host::block;
  const unsigned warp = threadIdx.x / host::kWarp, lane = threadIdx.x % host::kWarp;
  host::Barrier& barrier = block.warps[warp];
  double* slots = block.exchange[warp].data() + barrier.generation % 2 * host::kWarp;
  slots[lane] = static_cast<double>(value);
  host::wait(barrier, std::min(host::kWarp, blockDim.x - warp * host::kWarp));
  return static_cast<W>(slots[lane ^ static_cast<unsigned>(lane_mask)]);
}

template <typename T>
void keep(T&) {}

inline void sync_warp() { exchange(0, 0); }

inline void check_word(const void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) host::fail("misaligned 16-byte copy");
}
inline void copy_word(void* to, const void* from) {
  check_word(to, from);
  std::memcpy(to, from, 16);
}

// Asynchronous copies land when they are waited for, not before.
struct PendingCopy { void* to; const void* from; unsigned group; };
inline std::vector<std::vector<PendingCopy>> pending_copies;
inline std::vector<unsigned> copy_groups;  // committed ones of each thread

inline void copy_word_async(void* to_shared, const void* from_global) {
  check_word(to_shared, from_global);
  pending_copies[threadIdx.x].push_back({to_shared, from_global, copy_groups[threadIdx.x]});
}
inline void copies_commit() { ++copy_groups[threadIdx.x]; }
template <typename Done>
void land_copies(Done done) {
  std::vector<PendingCopy>& pending = pending_copies[threadIdx.x];
  for (const PendingCopy& copy : pending)
    if (done(copy)) std::memcpy(copy.to, copy.from, 16);
  std::erase_if(pending, done);
}
inline void copies_wait() {
  land_copies([](const PendingCopy&) { return true; });
}
template <unsigned N>
void copies_wait_but() {
  land_copies([](const PendingCopy& copy) { return copy.group + N < copy_groups[threadIdx.x]; });
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, void*, Arguments... arguments) {
  host::Block state;
  state.fibers.resize(threads);
  for (host::Fiber& fiber : state.fibers) fiber.stack.reset(new char[host::kStack]);
  state.body = [&] { kernel(arguments...); };
  pending_copies.assign(threads, {});
  copy_groups.assign(threads, 0);
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (int64_t k = 0; k < blocks; ++k) {
    blockIdx.x = static_cast<unsigned>(host::reversed ? blocks - 1 - k : k);
    // fresh memory for every block, filled with NaN, far from anything else that may be touched
    const int64_t bytes = std::max(16, (shared_bytes + 15) / 16 * 16);
    const std::unique_ptr<char, void (*)(void*)> memory(static_cast<char*>(std::aligned_alloc(16, bytes + 2 * host::kGuard)), std::free);
    state.shared = memory.get() + host::kGuard;
    std::memset(state.shared, 0xff, bytes);
    __asan_poison_memory_region(memory.get(), host::kGuard);
    __asan_poison_memory_region(state.shared + bytes, host::kGuard);
    host::run_block(state, blockDim.x);
    __asan_unpoison_memory_region(memory.get(), bytes + 2 * host::kGuard);
  }
}

}  // namespace spanet
