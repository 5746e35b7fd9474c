// Executes kernels for tests/cuda/shim.py: reads a job from standard input, runs it, writes what it gave to standard
// output, until the input ends.
//
// A buffer lies as far from an address divisible by 16 as the job says, and ends where its piece of the heap ends. One
// that is larger than its window is a sparse mapping, of which only the window is filled and given back.
#include <sys/mman.h>
#include <unistd.h>

#include "../../csrc/cuda/kernels.h"
#include "shim.h"

namespace {

enum Kernel : int64_t {
  kQuantize,
  kDequantize,
  kActivation,
  kByChannel,
  kByRow,
  kActivated,
  kRounding,
  kSpread,
  kAffine,
  kNormalize,
  kScaleByMask,
  kPackMask,
  kUnpackMask,
  kSelect,
  kPackUint,
  kUnpackUint
};

struct Job {
  int64_t kernel, dtype, numel, row_length, group_size, bits, samples, seed, stream, predicate, function, channels,
      inner, out_dtype;
  int64_t first_block, blocks, order, buffers;
  double lo, hi;
};

struct Description {
  int64_t size, offset, window, length, is_output, is_zero;
};

void read_all(void* p, size_t n) {
  for (size_t done = 0; done < n;) {
    const ssize_t got = read(STDIN_FILENO, (char*)p + done, n - done);
    if (got <= 0) exit(done == 0 && got == 0 ? 0 : 1);
    done += (size_t)got;
  }
}

void write_all(const void* p, size_t n) {
  for (size_t done = 0; done < n;) {
    const ssize_t put = write(STDOUT_FILENO, (const char*)p + done, n - done);
    if (put <= 0) exit(1);
    done += (size_t)put;
  }
}

class Buffer {
 public:
  Buffer() {
    read_all(&is_, sizeof is_);
    if (is_.size == 0) return;
    if (sparse()) {
      base_ = (char*)mmap(nullptr, (size_t)is_.size, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (base_ == MAP_FAILED) shim::fail("no room for a sparse buffer");
    } else {
      base_ = (char*)malloc((size_t)(is_.size + is_.offset));
      memset(base_, 0xA5, (size_t)(is_.size + is_.offset));
    }
    if (is_.is_zero != 0) memset(address(), 0, (size_t)is_.size);
    if (is_.is_output != 1) read_all(address() + is_.window, (size_t)is_.length);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (base_ == nullptr) return;
    if (sparse())
      munmap(base_, (size_t)is_.size);
    else
      free(base_);
  }
  char* address() const { return base_ == nullptr ? nullptr : base_ + is_.offset; }
  template <class T>
  T* of() const {
    return reinterpret_cast<T*>(address());
  }
  void give() const {
    if (is_.is_output != 0 && is_.length != 0) write_all(address() + is_.window, (size_t)is_.length);
  }

 private:
  bool sparse() const { return is_.length < is_.size; }
  Description is_;
  char* base_ = nullptr;
};

}  // namespace

int main() {
  using namespace hf_actnn;
  const Target target{0, 0};
  for (;;) {
    Job job;
    read_all(&job, sizeof job);
    std::vector<std::unique_ptr<Buffer>> b;
    for (int64_t i = 0; i < job.buffers; ++i) b.emplace_back(new Buffer);
    const int dtype = (int)job.dtype, bits = (int)job.bits;
    std::vector<int64_t> places((size_t)job.samples);
    shim::run = {0, -1, (int)job.order};
    // Buffers 0 and 1 are, of the kernels that have them, the places of samples and what advances the stream.
    const int64_t* const host = job.kernel <= kSpread ? b[0]->of<int64_t>() : nullptr;
    if (host != nullptr) place_samples(host, job.samples, places.data(), target);
    shim::run = {job.first_block, job.blocks, (int)job.order};
    const Cut cut{job.numel,     job.row_length, job.group_size,
                  (int)job.bits, job.samples,    host == nullptr ? nullptr : places.data()};
    switch (job.kernel) {
      case kQuantize:
        quantize(b[2]->of<void>(), dtype, cut, Draw{(uint64_t)job.seed, (uint64_t)job.stream, b[1]->of<int64_t>()},
                 b[3]->of<uint8_t>(), b[4]->of<uint32_t>(), b[5]->of<int>(), target);
        break;
      case kDequantize:
        dequantize(b[1]->of<uint8_t>(), b[2]->of<uint32_t>(), cut, dtype, b[3]->of<void>(), target);
        break;
      case kActivation:
        activation_backward(b[1]->of<uint8_t>(), b[2]->of<uint32_t>(), cut, dtype, (int)job.function, b[3]->of<void>(),
                            b[4]->of<void>(), target);
        break;
      case kByChannel:
        rebuild_by_channel(b[1]->of<uint8_t>(), b[2]->of<uint32_t>(), cut, dtype, b[3]->of<float>(), b[4]->of<float>(),
                           job.channels, job.inner, b[5]->of<uint8_t>(), job.hi, job.predicate != 0, b[6]->of<void>(),
                           target);
        break;
      case kByRow:
        rebuild_by_row(b[1]->of<uint8_t>(), b[2]->of<uint32_t>(), cut, dtype, (int)job.out_dtype, b[3]->of<float>(),
                       b[4]->of<float>(), b[5]->of<float>(), b[6]->of<float>(), job.inner, b[7]->of<void>(), target);
        break;
      case kActivated:
        rebuild_activation(b[1]->of<uint8_t>(), b[2]->of<uint32_t>(), cut, dtype, (int)job.function, b[3]->of<void>(),
                           target);
        break;
      case kRounding:
        rounding_variance(b[1]->of<void>(), dtype, b[2]->of<uint32_t>(), cut, b[3]->of<double>(), target);
        break;
      case kSpread:
        sample_spread(b[1]->of<void>(), dtype, cut, b[2]->of<float>(), b[3]->of<double>(), target);
        break;
      case kAffine:
        affine(b[3]->of<void>() != nullptr ? b[3]->of<void>() : b[4]->of<void>(), dtype, job.numel, job.channels,
               job.inner, b[0]->of<float>(), b[1]->of<float>(), b[2]->of<uint8_t>(), job.hi, job.lo, b[4]->of<void>(),
               target);
        break;
      case kNormalize:
        normalize(b[4]->of<float>(), job.numel, job.inner, b[0]->of<float>(), b[1]->of<float>(), b[2]->of<float>(),
                  b[3]->of<float>(), target);
        break;
      case kScaleByMask:
        scale_by_mask(b[1]->of<void>(), dtype, b[0]->of<uint8_t>(), job.numel, job.hi, job.lo, target);
        break;
      case kPackMask:
        pack_mask(b[0]->of<void>(), dtype, job.numel, (int)job.predicate, job.lo, job.hi, b[1]->of<uint8_t>(), target);
        break;
      case kUnpackMask:
        unpack_mask(b[0]->of<uint8_t>(), job.numel, dtype, job.hi, job.lo, b[1]->of<void>(), target);
        break;
      case kSelect:
        select_by_mask(b[0]->of<void>(), dtype, b[1]->of<uint8_t>(), job.numel, b[2]->of<void>(), target);
        break;
      case kPackUint:
        pack_uint(b[0]->of<uint8_t>(), job.numel, bits, b[1]->of<uint8_t>(), target);
        break;
      case kUnpackUint:
        unpack_uint(b[0]->of<uint8_t>(), job.numel, bits, dtype, b[1]->of<void>(), target);
        break;
      default:
        shim::fail("no such kernel");
    }
    for (const auto& buffer : b) buffer->give();
  }
}
