// Runs kernels on a CPU: enough of a device for csrc/cuda, in plain C++. Every file is compiled with this one in front.
//
// Every thread of a block is a fibre that runs until it has to wait for others, so what a kernel may not rely on, such
// as the order of lanes between two barriers, can be turned round (Run::order). Shared memory is a piece of the heap of
// exactly the size asked for, filled with rubbish, so that the address sanitizer and the comparison of bytes see what
// goes beyond it or comes too early. Lanes that wait for one another at different places, or for one that has ended,
// end the program.
#pragma once

#include <ucontext.h>

#include <cfenv>
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

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct dim3 {
  unsigned x, y, z;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx;

namespace shim {

// Which blocks of the next launches run, and in which order the lanes do.
struct Run {
  int64_t first_block, blocks;  // all of them if blocks is negative
  int order;                    // 0 forwards, 1 backwards, 2 odd lanes first
};
extern Run run;

// Ends the program with a line on stderr.
[[noreturn]] void fail(const char* what);

// Runs body once for every thread of a block.
void run_block(const std::vector<int>& order, void (*body)(void*), void* context);
std::vector<int> lane_order(int threads);
void wait_for_warp(const char* what);
void wait_for_block();
uint64_t exchange(uint64_t value, int lane_mask);
extern char* shared;

// What the device rounds towards zero.
float towards_zero_sub(float a, float b);
float towards_zero_fma(float a, float b, float c);

}  // namespace shim

inline float __fsub_rz(float a, float b) { return shim::towards_zero_sub(a, b); }
inline float __fmaf_rz(float a, float b, float c) { return shim::towards_zero_fma(a, b, c); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }

// Byte i of the result is the byte of (y, x) that the selector's nibble i names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i) & 15u;
    if (nibble > 7u) shim::fail("a selector of __byte_perm that spreads a sign, which no kernel uses");
    result |= (unsigned)(bytes >> (8 * nibble) & 0xFFu) << (8 * i);
  }
  return result;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= 8, "too wide for a lane");
  if (mask != 0xFFFFFFFFu) shim::fail("a shuffle of some lanes only, which no kernel uses");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shim::exchange(bits, lane_mask);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void __syncwarp() { shim::wait_for_warp("__syncwarp"); }
inline void __syncthreads() { shim::wait_for_block(); }

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

namespace hf_actnn {

inline char* shared_memory() { return shim::shared; }

template <class... Params, class Target, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int64_t shared_bytes, const Target&, Args... args) {
  constexpr int threads = 256;
  if (blocks < 1 || blocks > 0x7FFFFFFF) shim::fail("a launch of so many blocks");
  if (shared_bytes < 0 || shared_bytes > 48 * 1024) shim::fail("a launch with so much shared memory");
  auto body = [&] { kernel(args...); };
  const auto call = [](void* context) { (*static_cast<decltype(body)*>(context))(); };
  const std::vector<int> order = shim::lane_order(threads);
  const int64_t first = shim::run.blocks < 0 ? 0 : shim::run.first_block;
  const int64_t last = shim::run.blocks < 0 ? blocks : first + shim::run.blocks;
  if (first < 0 || last > blocks) shim::fail("blocks that this launch does not have");
  for (int64_t block = first; block < last; ++block) {
    const std::unique_ptr<char[]> memory(new char[(size_t)shared_bytes]);
    memset(memory.get(), 0xA5, (size_t)shared_bytes);
    shim::shared = memory.get();
    blockIdx.x = (unsigned)block;
    shim::run_block(order, call, &body);
  }
}

}  // namespace hf_actnn
