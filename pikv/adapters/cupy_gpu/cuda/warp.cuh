// What the kernels ask of a warp of a GPU, in PTX for sm_80 and newer. No header of the toolkit is needed.
// pikv.testing.cuda_on_host has a file of this name that does the same on a CPU.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

#define INFINITE __int_as_float(0x7f800000)

// Numbers of 16 bits, alone or two in a word, the first in the low half.
__device__ __forceinline__ float f16_to_float(u16 bits) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
}
__device__ __forceinline__ u16 float_to_f16(float number) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}
__device__ __forceinline__ u32 f16_pair(float first, float second) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
__device__ __forceinline__ u32 bf16_pair(float first, float second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
// Products that would be infinite are the greatest number instead: infinity times a code of 0 is no number.
__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
    u32 product;
    asm("{.reg .b32 x;\n mul.rn.f16x2 x, %1, %2;\n min.f16x2 x, x, %3;\n max.f16x2 %0, x, %4;}"
        : "=r"(product)
        : "r"(a), "r"(b), "r"(0x7bff7bffu), "r"(0xfbfffbffu));
    return product;
}
__device__ __forceinline__ u32 subtract_pairs(u32 a, u32 b) {
    u32 difference;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}

// Four bytes of the eight of a (0 to 3) and b (4 to 7), chosen by the digits of `order`.
__device__ __forceinline__ u32 pick_bytes(u32 a, u32 b, u32 order) { return __byte_perm(a, b, order); }

// sums[16, 8] += a[16, 16] b[16, 8]: of lane 4 g + t, sums are (g, 2t), (g, 2t + 1), (g + 8, ..), (g + 8, ..).
__device__ __forceinline__ void add_product_f16(float* sums, const u32* a, const u32* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void add_product_bf16(float* sums, const u32* a, const u32* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ float power_of_two(float exponent) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
    return power;
}

// A word, two or four that are read once: they pass the first-level cache by.
template <int WORDS>
__device__ __forceinline__ void load_once(u32* words, const u8* from) {
    static_assert(WORDS == 1 || WORDS == 2 || WORDS == 4, "one load");
    if (WORDS == 4) {
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "l"(from));
    } else if (WORDS == 2) {
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
    } else {
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(from));
    }
}
