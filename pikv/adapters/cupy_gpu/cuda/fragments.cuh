// A matrix of a page, [DEPTH, ROWS], rows side by side, as the left operand of matrix instructions.
//
// Keys are [channels, tokens] and values [tokens, channels], so one description serves both: of keys the sums run over
// channels and the rows are tokens, of values they run over tokens and the rows are channels. A warp takes SPAN rows at
// a time, of which lane 4 g + t holds SPAN / 8 from SPAN / 8 * g on; every byte is loaded by exactly one lane.
//
// A step is 16 entries along the depth. Which of them a lane holds is open, as long as the right operand agrees: lane t
// has four that follow one another, 4 quad(step, t) + {0, 2, 1, 3} in the order of its fragment. So four codes of a
// word, one a byte, need no shuffling: bytes 0 and 2, then 1 and 3.
#pragma once
#include <warp.cuh>

constexpr int BF16 = -16, F16 = 16;  // in the place of BITS: numbers as they are

template <int BITS, int ROWS, int SPAN, int DEPTH>
struct Matrix {
    static constexpr bool CODES = BITS == 8 || BITS == 4 || BITS == 2;
    static constexpr int STEPS = DEPTH / 16;
    static constexpr int ROW_TILES = SPAN / 16;
    static constexpr int WIDE = SPAN / 8;    // rows of a lane
    static constexpr int PER = CODES ? 8 / BITS : 1;
    static constexpr int WORDS = CODES ? DEPTH * BITS / 32 : 4;  // along the depth
    static constexpr int SHARED_BY = CODES && WORDS < 4 ? 4 / WORDS : 1;  // lanes, of a word
    static constexpr int LOADS = CODES ? (SHARED_BY > 1 ? 1 : WORDS / 4) : DEPTH / 4;
    static constexpr int LOAD_WORDS = CODES ? WIDE : WIDE / 2;
    static constexpr int HELD_WORDS = LOADS * LOAD_WORDS;

    u32 words[LOADS][LOAD_WORDS];

    // Which four entries of a step lane t holds.
    static __device__ __forceinline__ int quad(int step, int t) {
        if (!CODES) return 4 * step + t;
        if (SHARED_BY > 1) return t / SHARED_BY * PER + part(step, t);
        return (step / PER * 4 + t) * PER + part(step, t);
    }

    // Which of the PER groups of four codes in a word these are. With few words several lanes share one.
    static __device__ __forceinline__ int part(int step, int t) {
        if (SHARED_BY > 1) return step + STEPS * (t % SHARED_BY);
        return step % PER;
    }

    // first: address of row 0 of the span at depth 0.
    __device__ __forceinline__ void load(const u8* first, int lane) {
        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            if (CODES) {
                const int word = SHARED_BY > 1 ? t / SHARED_BY : 4 * i + t;
                load_once<LOAD_WORDS>(words[i], first + (word * ROWS + WIDE * g) * 4);
            } else {
                const int depth = 16 * (i / 4) + 4 * t + i % 4;
                load_once<LOAD_WORDS>(words[i], first + (depth * ROWS + WIDE * g) * 2);
            }
        }
    }

    // The fragment of a step and tile: rows WIDE g + 2 tile and the one after that.
    __device__ __forceinline__ void fragment(u32* a, int step, int tile, int t) const {
        if (CODES) {
            const u32* pair = words[SHARED_BY > 1 ? 0 : step / PER] + 2 * tile;
            const int shift = BITS * part(step, t);
            a[0] = codes(pair[0] >> shift), a[1] = codes(pair[1] >> shift);
            a[2] = codes(pair[0] >> (shift + 8)), a[3] = codes(pair[1] >> (shift + 8));
        } else {
            const u32 first = words[4 * step][tile], second = words[4 * step + 1][tile];
            const u32 third = words[4 * step + 2][tile], fourth = words[4 * step + 3][tile];
            a[0] = pick_bytes(first, third, 0x5410), a[1] = pick_bytes(first, third, 0x7632);
            a[2] = pick_bytes(second, fourth, 0x5410), a[3] = pick_bytes(second, fourth, 0x7632);
        }
    }

    // Bytes 0 and 2 of a word, without what stands above a code, as whole numbers in f16: 1024 + code, minus 1024.
    static __device__ __forceinline__ u32 codes(u32 word) {
        constexpr u32 mask = (1u << (CODES ? BITS : 1)) - 1;
        return subtract_pairs((word & (mask | mask << 16)) | 0x64006400u, 0x64006400u);
    }
};

// Two numbers as the right operand has them beside a matrix of these BITS; codes are multiplied in f16.
template <int BITS>
__device__ __forceinline__ u32 number_pair(float first, float second) {
    return BITS == BF16 ? bf16_pair(first, second) : f16_pair(first, second);
}

template <int BITS>
__device__ __forceinline__ void add_product(float* sums, const u32* a, const u32* b) {
    if (BITS == BF16) {
        add_product_bf16(sums, a, b);
    } else {
        add_product_f16(sums, a, b);
    }
}

// Four numbers of 16 bits that follow one another, at an address that is a multiple of 8, as a lane's fragment has them.
__device__ __forceinline__ void in_order(u32* b, const u16* four) {
    const uint2 both = *reinterpret_cast<const uint2*>(four);
    b[0] = pick_bytes(both.x, both.y, 0x5410), b[1] = pick_bytes(both.x, both.y, 0x7632);
}
