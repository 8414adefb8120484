// The choice of pages by bounds on their keys: score every page, then find the best of each row and name them in order.
//
// Compiled for KEY_DIM. The index of a page is f16 [2, KEY_DIM]: below and above every key, channel by channel.
#include <warp.cuh>

constexpr int WARPS = 8, AT_ONCE = 4;  // warps of a block; pages of a warp
constexpr float LARGEST = 3.402823466e38f;

// A row's pages in blocks of 32 (x), a row (y): scores float32 [rows, width]. query: float32 [rows, group, KEY_DIM],
// group 16 at most; ids int32 [rows, width]. A sum that is not a number counts as the greatest there is.
extern "C" __global__ void __launch_bounds__(32 * WARPS) score(
    const u8* index, const int* ids, const float* query, float* scores, i64 group, i64 width) {
    __shared__ float asked[16][KEY_DIM];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const i64 row = blockIdx.y;
    for (int i = threadIdx.x; i < group * KEY_DIM; i += 32 * WARPS) {
        asked[i / KEY_DIM][i % KEY_DIM] = query[row * group * KEY_DIM + i];
    }
    __syncthreads();
    for (int i = 0; i < AT_ONCE; i++) {
        const i64 column = (blockIdx.x * AT_ONCE + i) * static_cast<i64>(WARPS) + warp;
        if (column >= width) return;  // with its whole warp
        const u8* page = index + static_cast<i64>(ids[row * width + column]) * (4 * KEY_DIM);
        float best = -LARGEST;
        for (int head = 0; head < group; head++) {
            float sum = 0.f;
#pragma unroll
            for (int channel = 2 * lane; channel < KEY_DIM; channel += 64) {
                const u32 below = *reinterpret_cast<const u32*>(page + 2 * channel);
                const u32 above = *reinterpret_cast<const u32*>(page + 2 * (KEY_DIM + channel));
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float number = asked[head][channel + j];
                    sum += fminf(number, 0.f) * f16_to_float(static_cast<u16>(below >> 16 * j));
                    sum += fmaxf(number, 0.f) * f16_to_float(static_cast<u16>(above >> 16 * j));
                }
            }
#pragma unroll
            for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
            best = sum <= LARGEST ? fmaxf(best, sum) : LARGEST;
        }
        if (lane == 0) scores[row * width + column] = best;
    }
}

constexpr int THREADS = 256;

// How many threads of the block before this one have the flag, and how many have it in all.
__device__ __forceinline__ int count_before(int flag, int* all) {
    __shared__ int totals[THREADS / 32];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int sum = flag;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0u, sum, distance);
        if (lane >= distance) sum += other;
    }
    if (lane == 31) totals[warp] = sum;
    __syncthreads();
    int before = sum - flag, total = 0;
    for (int i = 0; i < THREADS / 32; i++) {
        if (i < warp) before += totals[i];
        total += totals[i];
    }
    __syncthreads();
    *all = total;
    return before;
}

// A number in the order of the scores; the newest page of a row is above all others.
__device__ __forceinline__ u32 ordered(const float* scores, int column, int newest) {
    if (column == newest) return ~0u;
    const u32 bits = static_cast<u32>(__float_as_int(scores[column]));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// A block for each row (x): columns int64 [rows, wanted], increasing, of the newest and the best of counts int64 [rows]
// pages. Digit by digit, from the top: how many scores have it, so which is the least that is wanted.
extern "C" __global__ void __launch_bounds__(THREADS) choose(
    const float* all_scores, const i64* counts, i64* all_columns, i64 width, i64 wanted) {
    __shared__ int tally[256];
    __shared__ u32 least;
    __shared__ int missing;  // how many are wanted of those that equal the least
    const float* scores = all_scores + blockIdx.x * width;
    i64* columns = all_columns + blockIdx.x * wanted;
    const int count = static_cast<int>(counts[blockIdx.x]), thread = threadIdx.x;
    if (count <= wanted) {
        for (int i = thread; i < wanted; i += THREADS) columns[i] = i;
        return;
    }
    if (thread == 0) least = 0, missing = static_cast<int>(wanted);
    for (int shift = 24; shift >= 0; shift -= 8) {
        tally[thread] = 0;
        __syncthreads();
        const u32 known = least, mask = shift == 24 ? 0 : ~0u << (shift + 8);
        for (int column = thread; column < count; column += THREADS) {
            const u32 key = ordered(scores, column, count - 1);
            if ((key & mask) == known) atomicAdd(&tally[key >> shift & 255], 1);
        }
        __syncthreads();
        if (thread == 0) {
            int digit = 255;
            while (tally[digit] < missing) missing -= tally[digit--];
            least = known | static_cast<u32>(digit) << shift;
        }
        __syncthreads();
    }
    int equal_before = 0, placed = 0;
    for (int first = 0; first < count; first += THREADS) {
        const int column = first + thread;
        const u32 key = column < count ? ordered(scores, column, count - 1) : 0;
        const bool equal = column < count && key == least;
        int equals, chosen;
        const int rank = equal_before + count_before(equal, &equals);
        const bool taken = column < count && (key > least || (equal && rank < missing));
        const int place = placed + count_before(taken, &chosen);
        if (taken) columns[place] = column;
        equal_before += equals, placed += chosen;
    }
}
