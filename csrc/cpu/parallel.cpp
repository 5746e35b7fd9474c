#include "parallel.h"

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#endif
#if defined(HF_ACTNN_X86)
#include <immintrin.h>
#endif

namespace hf_actnn {
namespace {

// Below this many values a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;
// Starting a plain thread costs tens of microseconds, waking an OpenMP one a few.
constexpr int64_t kGrainPlain = 1 << 20;

// A second OpenMP runtime in the process would bring a second set of threads that spin between regions, on the same
// cores: so this module links none and asks the one that torch has loaded.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  std::string name = "std::thread";
};

#if defined(__linux__)
std::atomic<bool> forked{false};

int visit(dl_phdr_info* info, size_t, void* data) {
  const std::string path = info->dlpi_name != nullptr ? info->dlpi_name : "";
  const std::string base = path.substr(path.rfind('/') + 1);
  if (base.rfind("libgomp", 0) != 0 && base.rfind("libiomp", 0) != 0 && base.rfind("libomp", 0) != 0) return 0;
  auto& paths = *static_cast<std::vector<std::string>*>(data);
  // Torch's own copy first: other packages may have brought theirs.
  if (path.find("/torch/") != std::string::npos || path.find("/torch.libs/") != std::string::npos)
    paths.insert(paths.begin(), path);
  else
    paths.push_back(path);
  return 0;
}

OpenMP find_openmp() {
  OpenMP found;
  std::vector<std::string> paths;
  dl_iterate_phdr(visit, &paths);
  for (const std::string& path : paths) {
    void* library = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    if (library == nullptr) continue;
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    found.thread_num = reinterpret_cast<decltype(found.thread_num)>(dlsym(library, "omp_get_thread_num"));
    found.num_threads = reinterpret_cast<decltype(found.num_threads)>(dlsym(library, "omp_get_num_threads"));
    if (found.parallel != nullptr && found.thread_num != nullptr && found.num_threads != nullptr) {
      found.name = "openmp: " + path.substr(path.rfind('/') + 1);
      // A forked child has the runtime's state but not its threads, and would wait for them for ever.
      pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
      return found;
    }
    found = OpenMP();
  }
  return found;
}
bool is_forked() { return forked.load(); }
#else
OpenMP find_openmp() { return OpenMP(); }
bool is_forked() { return false; }
#endif

const OpenMP& openmp() {
  static const OpenMP found = find_openmp();
  return found;
}

// Rounding to nearest with subnormals, whatever the caller has set (torch.set_flush_denormal): the bytes must not
// depend on it.
class FloatingPointState {
 public:
#if defined(HF_ACTNN_X86)
  FloatingPointState() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FloatingPointState() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

struct Job {
  Work work;
  void* context;
  int64_t units;
  int pieces;

  void piece(int i) const {
    FloatingPointState state;
    work(context, units * i / pieces, units * (i + 1) / pieces);
  }
};

void team(void* data) {
  const Job& job = *static_cast<const Job*>(data);
  const int threads = openmp().num_threads();
  for (int i = openmp().thread_num(); i < job.pieces; i += threads) job.piece(i);
}

}  // namespace

void parallel_for(int64_t units, int64_t elements, int max_threads, Work work, void* context) {
  const bool plain = openmp().parallel == nullptr;
  const int64_t worth = elements / (plain ? kGrainPlain : kGrain);
  int64_t pieces = worth < max_threads ? worth : max_threads;
  if (pieces > units) pieces = units;
  if (pieces < 2 || is_forked()) pieces = 1;
  Job job{work, context, units, (int)pieces};
  if (pieces == 1) {
    job.piece(0);
  } else if (!plain) {
    openmp().parallel(team, &job, (unsigned)pieces, 0);
  } else {
    std::vector<std::thread> threads;
    for (int i = 1; i < job.pieces; ++i) threads.emplace_back([&job, i] { job.piece(i); });
    job.piece(0);
    for (std::thread& thread : threads) thread.join();
  }
}

const char* thread_backend() { return openmp().name.c_str(); }

}  // namespace hf_actnn
