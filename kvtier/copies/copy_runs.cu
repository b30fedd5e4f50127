// Copies runs of bytes between device memory and page-locked host memory, either way.
//
// For small scattered runs, where a copy engine is bound by its work per run. A warp takes a run and
// keeps up to 32 x 16 x 8 bytes of it in flight; what limits reads over PCIe is how many bytes are
// under way, so few multiprocessors are enough and the model keeps the others. Loads and stores are
// marked as streaming: nothing here is used twice.

static constexpr int UNROLL = 8;

template <typename Word>
__device__ __forceinline__ void copy_run(
    unsigned long long target, unsigned long long source, long long n_bytes, int lane) {
  Word* to = reinterpret_cast<Word*>(target);
  const Word* from = reinterpret_cast<const Word*>(source);
  const long long words = n_bytes / static_cast<long long>(sizeof(Word));
  long long at = lane;
  for (; at + 32 * (UNROLL - 1) < words; at += 32 * UNROLL) {
    Word values[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) values[i] = __ldcs(from + at + 32 * i);
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) __stcs(to + at + 32 * i, values[i]);
  }
  for (; at < words; at += 32) __stcs(to + at, __ldcs(from + at));
}

// The address space of host memory is the device's own (unified addressing), so both ends are plain
// pointers. Each run is copied in the widest words that both addresses and the length are multiples of.
extern "C" __global__ void __launch_bounds__(1024) kvtier_copy_runs(
    const unsigned long long* __restrict__ targets,
    const unsigned long long* __restrict__ sources,
    const long long* __restrict__ sizes,
    long long count) {
  const int lane = threadIdx.x % 32;
  const long long warps = static_cast<long long>(gridDim.x) * (blockDim.x / 32);
  for (long long run = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; run < count; run += warps) {
    const unsigned long long target = targets[run];
    const unsigned long long source = sources[run];
    const long long n_bytes = sizes[run];
    const unsigned long long bits = target | source | static_cast<unsigned long long>(n_bytes);
    if (bits % 16 == 0) {
      copy_run<uint4>(target, source, n_bytes, lane);
    } else if (bits % 8 == 0) {
      copy_run<unsigned long long>(target, source, n_bytes, lane);
    } else if (bits % 4 == 0) {
      copy_run<unsigned int>(target, source, n_bytes, lane);
    } else {
      copy_run<unsigned char>(target, source, n_bytes, lane);
    }
  }
}
