// What warp.cuh of the kernels offers, on a CPU.
#pragma once
#include <host.hpp>

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

#define INFINITE __int_as_float(0x7f800000)

static inline float f16_to_float(u16 bits) { return static_cast<float>(bits_as<_Float16>(bits)); }
static inline u16 float_to_f16(float number) { return bits_as<u16>(static_cast<_Float16>(number)); }
static inline float bf16_to_float(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }
static inline u16 float_to_bf16(float number) {
    const u32 bits = bits_as<u32>(number);
    if (std::isnan(number)) return 0x7fff;
    return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline u32 in_word(u16 first, u16 second) { return first | static_cast<u32>(second) << 16; }
static inline u16 low(u32 pair) { return static_cast<u16>(pair); }
static inline u16 high(u32 pair) { return static_cast<u16>(pair >> 16); }
static inline u32 f16_pair(float first, float second) { return in_word(float_to_f16(first), float_to_f16(second)); }
static inline u32 bf16_pair(float first, float second) { return in_word(float_to_bf16(first), float_to_bf16(second)); }
static inline float finite(float number) { return std::fmin(std::fmax(number, -65504.f), 65504.f); }
static inline u32 multiply_pairs(u32 a, u32 b) {
    return f16_pair(finite(f16_to_float(low(a)) * f16_to_float(low(b))),
                    finite(f16_to_float(high(a)) * f16_to_float(high(b))));
}
static inline u32 subtract_pairs(u32 a, u32 b) {
    return f16_pair(f16_to_float(low(a)) - f16_to_float(low(b)), f16_to_float(high(a)) - f16_to_float(high(b)));
}
static inline u32 pick_bytes(u32 a, u32 b, u32 order) {
    const u64 both = static_cast<u64>(b) << 32 | a;
    u32 picked = 0;
    for (int i = 0; i < 4; i++) picked |= static_cast<u32>(both >> 8 * (order >> 4 * i & 7) & 255) << 8 * i;
    return picked;
}

template <class Number>
static inline void add_product(float* sums, const u32* a, const u32* b, Number number) {
    const host::Slot* slots = host::trade([&](host::Slot& slot) {
        for (int i = 0; i < 8; i++) slot.numbers[i] = number(static_cast<u16>(a[i / 2] >> 16 * (i % 2)));
        for (int i = 0; i < 4; i++) slot.numbers[8 + i] = number(static_cast<u16>(b[i / 2] >> 16 * (i % 2)));
    });
    const int g = host::current % 32 / 4, t = host::current % 4;
    for (int e = 0; e < 4; e++) {
        const int below = e / 2, column = 2 * t + e % 2;
        for (int depth = 0; depth < 16; depth++) {
            const int lane = depth % 8 / 2, late = depth / 8, place = depth % 2;
            sums[e] += slots[4 * g + lane].numbers[4 * late + 2 * below + place] *
                       slots[4 * column + lane].numbers[8 + 2 * late + place];
        }
    }
}
static inline void add_product_f16(float* sums, const u32* a, const u32* b) { add_product(sums, a, b, f16_to_float); }
static inline void add_product_bf16(float* sums, const u32* a, const u32* b) { add_product(sums, a, b, bf16_to_float); }

static inline float power_of_two(float exponent) { return std::exp2(exponent); }

template <int WORDS>
static inline void load_once(u32* words, const u8* from) {
    if (reinterpret_cast<uintptr_t>(from) % (4 * WORDS)) {
        std::fprintf(stderr, "a load of %d bytes from an address that is no multiple of that\n", 4 * WORDS);
        std::abort();
    }
    std::memcpy(words, from, 4 * WORDS);
}
