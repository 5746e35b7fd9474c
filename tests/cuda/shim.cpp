// The fibres behind shim.h.
#include "shim.h"

#include "../../csrc/cuda/kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx = {0, 0, 0}, blockIdx = {0, 0, 0};

namespace shim {

Run run = {0, -1, 0};
char* shared = nullptr;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

// Those who wait for each other: a warp, or a block.
struct Barrier {
  int members = 0, arrived = 0;
  uint64_t generation = 0;
  const char* what = nullptr;
};

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool ended = false;
  const Barrier* waits = nullptr;
  uint64_t since = 0;
  void* fake_stack = nullptr;
};

std::vector<Fibre> fibres;
std::vector<Barrier> warps;
std::vector<uint64_t> slots;  // two for each thread: a shuffle's values stay until every lane has read them
Barrier whole_block;
ucontext_t scheduler;
int current = 0;
void (*the_body)(void*) = nullptr;
void* the_context = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;

void leave(void** fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, scheduler_stack, scheduler_stack_size);
#else
  (void)fake_stack;
#endif
}

void arrived_in_fibre(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_size);
#else
  (void)fake_stack;
#endif
}

void start() {
  arrived_in_fibre(nullptr);
  the_body(the_context);
  fibres[(size_t)current].ended = true;
  leave(nullptr);
  swapcontext(&fibres[(size_t)current].context, &scheduler);
}

void resume(int index) {
  Fibre& fibre = fibres[(size_t)index];
  current = index;
  threadIdx.x = (unsigned)index;
#if defined(__SANITIZE_ADDRESS__)
  void* mine = nullptr;
  __sanitizer_start_switch_fiber(&mine, fibre.stack.get(), kStack);
#endif
  swapcontext(&scheduler, &fibre.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#endif
}

void wait(Barrier& barrier, const char* what) {
  if (barrier.arrived == 0)
    barrier.what = what;
  else if (strcmp(barrier.what, what) != 0)
    fail("threads wait for each other at different places");
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fibre& fibre = fibres[(size_t)current];
  fibre.waits = &barrier;
  fibre.since = barrier.generation;
  leave(&fibre.fake_stack);
  swapcontext(&fibre.context, &scheduler);
  arrived_in_fibre(fibre.fake_stack);
}

}  // namespace

void fail(const char* what) {
  fprintf(stderr, "shim: %s\n", what);
  abort();
}

std::vector<int> lane_order(int threads) {
  std::vector<int> order;
  for (int i = 0; i < threads; ++i)
    order.push_back(run.order == 0 ? i : run.order == 1 ? threads - 1 - i : (2 * i + 1) % threads - (2 * i >= threads));
  return order;
}

void run_block(const std::vector<int>& order, void (*body)(void*), void* context) {
  const int threads = (int)order.size();
  if (fibres.empty()) fibres = std::vector<Fibre>((size_t)threads);
  warps.assign((size_t)(threads / kWarp), Barrier());
  for (Barrier& warp : warps) warp.members = kWarp;
  whole_block = Barrier();
  whole_block.members = threads;
  slots.assign((size_t)(2 * threads), 0);
  the_body = body;
  the_context = context;
  for (Fibre& fibre : fibres) {
    fibre.ended = false;
    fibre.waits = nullptr;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, start, 0);
  }
  for (int left = threads; left > 0;) {
    bool moved = false;
    for (int index : order) {
      Fibre& fibre = fibres[(size_t)index];
      if (fibre.ended || (fibre.waits != nullptr && fibre.waits->generation == fibre.since)) continue;
      fibre.waits = nullptr;
      resume(index);
      left -= fibre.ended;
      moved = true;
    }
    if (!moved) fail("threads wait for others that have ended");
  }
}

void wait_for_warp(const char* what) { wait(warps[(size_t)(current / kWarp)], what); }

void wait_for_block() { wait(whole_block, "__syncthreads"); }

uint64_t exchange(uint64_t value, int lane_mask) {
  const size_t half = (warps[(size_t)(current / kWarp)].generation & 1) * (slots.size() / 2);
  const int me = current;
  slots[half + (size_t)me] = value;
  char what[32];
  snprintf(what, sizeof what, "shuffle by %d", lane_mask);
  static char names[kWarp][32];
  memcpy(names[lane_mask & (kWarp - 1)], what, sizeof what);
  wait_for_warp(names[lane_mask & (kWarp - 1)]);
  return slots[half + (size_t)(me / kWarp * kWarp + ((me % kWarp) ^ lane_mask))];
}

// Not inlined, and of volatile values: the compiler knows nothing of rounding modes.
__attribute__((noinline)) float towards_zero_sub(float a, float b) {
  const volatile float x = a, y = b;
  std::fesetround(FE_TOWARDZERO);
  const volatile float r = x - y;
  std::fesetround(FE_TONEAREST);
  return r;
}

__attribute__((noinline)) float towards_zero_fma(float a, float b, float c) {
  const volatile float x = a, y = b, z = c;
  std::fesetround(FE_TOWARDZERO);
  const volatile float r = std::fmaf(x, y, z);
  std::fesetround(FE_TONEAREST);
  return r;
}

}  // namespace shim

namespace hf_actnn {

// A CPU runs all of them.
void probe(int) {}

}  // namespace hf_actnn
