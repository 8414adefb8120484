// Copies of whole pages, wherever a GPU reaches their memory: its own, or pinned memory of the host.
#include <warp.cuh>

// A block for each page (x): row from[page] of `source` becomes row to[page] of `target`, int64 both, of `bytes` bytes, a
// multiple of 16.
extern "C" __global__ void copy_pages(const i64* to, const i64* from, u8* target, const u8* source, i64 bytes) {
    uint4* here = reinterpret_cast<uint4*>(target + to[blockIdx.x] * bytes);
    const uint4* there = reinterpret_cast<const uint4*>(source + from[blockIdx.x] * bytes);
    for (i64 i = threadIdx.x; i < bytes / 16; i += blockDim.x) here[i] = there[i];
}
