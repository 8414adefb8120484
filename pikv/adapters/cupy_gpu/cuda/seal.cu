// Writing pages: a block takes a page's tokens from the tail and encodes them, with the bytes that the form says.
//
// Compiled for KEY_DIM, VALUE_DIM, PAGE_SIZE, NUMBERS (of the tail: 0 for f32, F16 or BF16); KEY_BITS, KEY_GROUP,
// KEY_ORDER and the same of VALUE (bits 0: as they are; order 1: of words, or 0: plain); STRIDE and the offsets in a page; BOUNDS,
// whether an index of the keys is written. The rule of codes is that of `Affine`: rounded as float64 would be, which is
// asked only where float32 comes near a tie.
#include <warp.cuh>

constexpr int BF16 = -16, F16 = 16, THREADS = 256;
constexpr int MOST_NUMBERS = 16 * 256 + 64;  // in shared memory at a time, and what keeps rows in other banks

__device__ __forceinline__ float number_at(const void* states, i64 at) {
    if (NUMBERS == 0) return static_cast<const float*>(states)[at];
    const u16 bits = static_cast<const u16*>(states)[at];
    return NUMBERS == F16 ? f16_to_float(bits) : __uint_as_float(static_cast<u32>(bits) << 16);
}

// The largest f16 that is not above a number, minus infinity included; -0 for -0.
__device__ __forceinline__ u16 half_at_most(double bound) {
    const u16 near = float_to_f16(static_cast<float>(bound));
    if (static_cast<double>(f16_to_float(near)) <= bound) return near;
    return near & 0x8000 ? near + 1 : near == 0 ? 0x8001 : near - 1;
}

// The tokens of a page: its row of the tail, and the slots in it.
struct Tokens {
    const void* states;
    i64 first;  // the number of entries before slot 0
    const i64* slots;
};

// Keys or values: RUNS rows of ENTRIES, of which GROUP neighbours share a scale and a zero; FEW runs at a time. Keys run
// along tokens, values along channels.
template <bool OF_KEYS, int RUNS, int ENTRIES, int BITS, int GROUP, int ORDER>
struct Side {
    static constexpr int DIM = OF_KEYS ? RUNS : ENTRIES;
    static constexpr int MOST = OF_KEYS ? 64 : 16, FEW = RUNS < MOST ? RUNS : MOST;
    static constexpr int PITCH = OF_KEYS ? FEW : ENTRIES + 1;
    static constexpr int LENGTH = BITS ? GROUP : ENTRIES, GROUPS = ENTRIES / LENGTH;
    static constexpr int PER = BITS ? 8 / BITS : 1, HIGHEST = (1 << BITS) - 1;

    static __device__ __forceinline__ int place(int run, int entry) {
        return OF_KEYS ? entry * PITCH + run : run * PITCH + entry;
    }

    // Read numbers of the runs from `first` on; written as they are where there are no codes.
    static __device__ void read(const Tokens& from, int first, int count, float* numbers, u8* codes) {
        for (int i = threadIdx.x; i < count * ENTRIES; i += THREADS) {
            const int run = OF_KEYS ? i % count : i / ENTRIES, entry = OF_KEYS ? i / count : i % ENTRIES;
            const i64 token = from.slots[OF_KEYS ? entry : first + run];
            const i64 at = from.first + token * DIM + (OF_KEYS ? first + run : entry);
            numbers[place(run, entry)] = number_at(from.states, at);
            if (BITS) continue;
            const i64 to = static_cast<i64>(first + run) * ENTRIES + entry;
            if (NUMBERS == 0) {
                reinterpret_cast<u32*>(codes)[to] = static_cast<const u32*>(from.states)[at];
            } else {
                reinterpret_cast<u16*>(codes)[to] = static_cast<const u16*>(from.states)[at];
            }
        }
    }

    static __device__ __forceinline__ u32 code(float number, float zero, float scale) {
        if (scale == 0.f) return 0;
        const float quotient = (number - zero) / scale;  // wrong by less than 2^-14
        const float beyond = quotient - floorf(quotient);
        if (fabsf(beyond - 0.5f) > 0x1p-10f) return static_cast<u32>(rintf(quotient));
        return static_cast<u32>(rint((static_cast<double>(number) - zero) / scale));
    }

    // Find scales, zeros and bounds of each run and group; false for what f16 does not reach.
    static __device__ bool limit(int first, int count, const float* numbers, float (*found)[4], u8* scales, u8* zeros) {
        bool fine = true;
        for (int i = threadIdx.x; i < count * GROUPS; i += THREADS) {
            const int run = i % count, group = i / count;
            float least = numbers[place(run, group * LENGTH)], greatest = least;
            for (int entry = group * LENGTH; entry < (group + 1) * LENGTH; entry++) {
                const float number = numbers[place(run, entry)];
                least = fminf(least, number), greatest = fmaxf(greatest, number);
                if (BITS) fine = fine && fabsf(number) <= 65504.f;
            }
            float* own = found[group * FEW + run];
            own[2] = least, own[3] = greatest;
            if (!BITS) continue;
            const u16 zero = half_at_most(least + 0.0);  // the sum makes 0.0 of -0.0
            own[1] = f16_to_float(zero);
            const u16 scale = half_at_most(-(greatest + 0.0 - own[1]) / HIGHEST) ^ 0x8000;
            own[0] = f16_to_float(scale);
            own[2] = code(least, own[1], own[0]) * own[0] + own[1];
            own[3] = code(greatest, own[1], own[0]) * own[0] + own[1];
            reinterpret_cast<u16*>(scales)[group * RUNS + first + run] = scale;
            reinterpret_cast<u16*>(zeros)[group * RUNS + first + run] = zero;
        }
        return fine;
    }

    static __device__ __forceinline__ u32 code_at(int run, int entry, const float* numbers, float (*found)[4]) {
        const float* own = found[entry / LENGTH * FEW + run];
        return code(numbers[place(run, entry)], own[1], own[0]);
    }

    static __device__ void pack(int first, int count, const float* numbers, float (*found)[4], u8* codes) {
        constexpr int IN_WORD = 4 * PER, ROW = ENTRIES / PER;
        for (int i = threadIdx.x; i < count * ROW; i += THREADS) {
            u32 packed = 0;
            if (ORDER) {
                if (i >= count / IN_WORD * ENTRIES) continue;
                const int word = i / ENTRIES, entry = i % ENTRIES;
                for (int j = 0; j < IN_WORD; j++) {  // byte j % 4, part j / 4
                    const u32 one = code_at(word * IN_WORD + j, entry, numbers, found);
                    packed |= one << (8 * (j % 4) + j / 4 * BITS);
                }
                reinterpret_cast<u32*>(codes)[first / IN_WORD * ENTRIES + i] = packed;
            } else {
                const int run = i / ROW, byte = i % ROW;
                for (int j = 0; j < PER; j++) packed |= code_at(run, byte * PER + j, numbers, found) << (j * BITS);
                codes[first * ROW + i] = static_cast<u8>(packed);
            }
        }
    }

    // Write all runs; bounds u16 [2, RUNS] unless null. False for what cannot be held.
    static __device__ bool write(const Tokens& from, u8* codes, u8* scales, u8* zeros, u16* bounds, float* numbers) {
        static_assert(FEW * ENTRIES <= MOST_NUMBERS && PITCH * (OF_KEYS ? ENTRIES : FEW) <= MOST_NUMBERS, "room");
        __shared__ float found[GROUPS * FEW][4];  // scale, zero, least, greatest as they decode
        bool fine = true;
        for (int first = 0; first < RUNS; first += FEW) {
            const int count = RUNS - first < FEW ? RUNS - first : FEW;
            read(from, first, count, numbers, codes);
            __syncthreads();
            if (BITS || bounds) fine = limit(first, count, numbers, found, scales, zeros) && fine;
            __syncthreads();
            if (BITS) pack(first, count, numbers, found, codes);
            for (int run = threadIdx.x; bounds && run < count; run += THREADS) {
                float least = found[run][2], greatest = found[run][3];
                for (int group = 1; group < GROUPS; group++) {
                    least = fminf(least, found[group * FEW + run][2]);
                    greatest = fmaxf(greatest, found[group * FEW + run][3]);
                }
                bounds[first + run] = half_at_most(least);
                bounds[RUNS + first + run] = half_at_most(-static_cast<double>(greatest)) ^ 0x8000;
            }
            __syncthreads();
        }
        return fine;
    }
};
typedef Side<true, KEY_DIM, PAGE_SIZE, KEY_BITS, KEY_GROUP, KEY_ORDER> Keys;
typedef Side<false, PAGE_SIZE, VALUE_DIM, VALUE_BITS, VALUE_GROUP, VALUE_ORDER> Values;

// A block for each page (x). The tail: keys and values [sequences, heads, room, dim], positions int32. sequences, head
// int64 [pages] and slots int64 [pages, PAGE_SIZE] say what a page is made of. out: uint8 [pages, STRIDE], zeros before;
// index: f16 [pages, 2, KEY_DIM] if there are BOUNDS. refused int32 [pages] becomes 1 for what f16 does not reach.
extern "C" __global__ void __launch_bounds__(THREADS) seal(
    const void* keys, const void* values, const int* positions, const i64* sequences, const i64* heads_of,
    const i64* all_slots, u8* out, u16* index, int* refused, i64 heads, i64 room) {
    __shared__ float numbers[MOST_NUMBERS];
    const i64 page = blockIdx.x, row = sequences[page] * heads + heads_of[page];
    const i64* slots = all_slots + page * PAGE_SIZE;
    u8* to = out + page * STRIDE;
    for (int token = threadIdx.x; token < PAGE_SIZE; token += THREADS) {
        reinterpret_cast<int*>(to + POSITIONS)[token] = positions[row * room + slots[token]];
    }
    u16* bounds = BOUNDS ? index + page * 2 * KEY_DIM : nullptr;
    const Tokens some_keys = {keys, row * room * KEY_DIM, slots}, some_values = {values, row * room * VALUE_DIM, slots};
    const bool fine = Keys::write(some_keys, to + KEYS, to + KEY_SCALES, to + KEY_ZEROS, bounds, numbers);
    if (!Values::write(some_values, to + VALUES, to + VALUE_SCALES, to + VALUE_ZEROS, nullptr, numbers) || !fine) {
        refused[page] = 1;
    }
}
