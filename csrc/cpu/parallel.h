// Splits work over threads: those of the OpenMP runtime that the host process already runs, or plain ones.
#pragma once

#include <cstdint>

namespace hf_actnn {

using Work = void (*)(void* context, int64_t first, int64_t last);

// Calls work on ranges that make up [0, units), `elements` values in all, with at most max_threads threads.
void parallel_for(int64_t units, int64_t elements, int max_threads, Work work, void* context);

// Where the threads come from: "openmp: <library>", or "std::thread".
const char* thread_backend();

}  // namespace hf_actnn
