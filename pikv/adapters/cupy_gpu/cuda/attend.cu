// Attention of up to 8 * TILES queries of a KV head to some of its pages, read once, as they are encoded.
//
// Compiled for one form of page: KEY_DIM, VALUE_DIM, PAGE_SIZE; KEY_BITS, VALUE_BITS (codes of 8, 4 or 2 bits, or BF16
// or F16); STRIDE bytes a page and in it the offsets KEYS, KEY_SCALES, KEY_ZEROS, VALUES, VALUE_SCALES, VALUE_ZEROS and
// POSITIONS. A warp takes a page at a time, 32 tokens of it (16 if it has no more), and needs no other warp until it is
// through with its pages. The next keys are loaded while values are summed up, values while scores are.
//
// Scales are folded into the right operand: a group's key scales into the queries, its value scales into the weights.
// Zeros are one more product each: of keys, alike for all rows; of values, a row for each group of 32 channels.
#include <fragments.cuh>

constexpr int WARPS = 4, QUERIES = 8 * TILES;
constexpr int TOKENS = PAGE_SIZE < 32 ? PAGE_SIZE : 32, BLOCKS = PAGE_SIZE / TOKENS;
constexpr int SPANS = VALUE_DIM / 32;
constexpr int WEIGHT_ROW = TOKENS + 8;  // f16 numbers from one query's weights to the next, so that banks differ
constexpr float LN2 = 0.6931471805599453f, LOG2_E = 1.4426950408889634f;

// A block's keys, and its values, are loaded at once if registers hold them beside the sums, else in 2 or 4 parts.
constexpr int HELD = SPANS * TILES >= 8 ? 32 : 64;  // words of each
constexpr int parts_of(int words) { return words <= HELD ? 1 : words <= 2 * HELD ? 2 : 4; }
constexpr int KEY_PARTS = parts_of(Matrix<KEY_BITS, PAGE_SIZE, TOKENS, KEY_DIM>::HELD_WORDS);
constexpr int KEY_PART = KEY_DIM / KEY_PARTS;
typedef Matrix<KEY_BITS, PAGE_SIZE, TOKENS, KEY_PART> Keys;
typedef Matrix<VALUE_BITS, VALUE_DIM, 32, TOKENS> Values;
constexpr int VALUE_PARTS = parts_of(SPANS * Values::HELD_WORDS), VALUE_PART = SPANS / VALUE_PARTS;
static_assert(VALUE_PART * VALUE_PARTS == SPANS && KEY_PART % 16 == 0, "whole parts");

// What a warp keeps in shared memory. scales, zeros: of the block at hand, of keys then of values.
struct alignas(16) WarpMemory {
    u16 key_scales[KEY_DIM], key_zeros[KEY_DIM];
    u16 value_scales[SPANS][TOKENS], value_zeros[SPANS][TOKENS];
    u16 weights[QUERIES][WEIGHT_ROW];
};

__device__ __forceinline__ float read_query(const void* query, i64 kind, i64 at) {
    if (kind == 0) return static_cast<const float*>(query)[at];
    const u16 bits = static_cast<const u16*>(query)[at];
    return kind == F16 ? f16_to_float(bits) : __uint_as_float(static_cast<u32>(bits) << 16);
}

// The scales and zeros of a block, on their way to shared memory: of keys [KEY_DIM], of values [SPANS, TOKENS] in rows of
// PAGE_SIZE. Both are COUNT numbers in `row` long pieces that lie `pitch` numbers apart.
template <int COUNT, int ROW, int PITCH>
struct Limits {
    static constexpr int LANES = (COUNT / 2 + 31) / 32;
    u32 scales[LANES], zeros[LANES];

    static __device__ __forceinline__ int place(int pair) { return 2 * (2 * pair / ROW * PITCH + 2 * pair % ROW); }

    __device__ __forceinline__ void load(const u8* first_scale, const u8* first_zero, int lane) {
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            const int pair = lane + 32 * i;
            if (pair < COUNT / 2) {
                load_once<1>(&scales[i], first_scale + place(pair));
                load_once<1>(&zeros[i], first_zero + place(pair));
            }
        }
    }

    __device__ __forceinline__ void store(u16* all_scales, u16* all_zeros, int lane) const {
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            const int pair = lane + 32 * i;
            if (pair < COUNT / 2) {
                reinterpret_cast<u32*>(all_scales)[pair] = scales[i];
                reinterpret_cast<u32*>(all_zeros)[pair] = zeros[i];
            }
        }
    }
};
typedef Limits<KEY_DIM, KEY_DIM, KEY_DIM> KeyLimits;
typedef Limits<SPANS * TOKENS, TOKENS, PAGE_SIZE> ValueLimits;

__device__ __forceinline__ void load_key_limits(KeyLimits& limits, const u8* page, int block, int lane) {
    const int at = 2 * KEY_DIM * block;
    if (Keys::CODES) limits.load(page + KEY_SCALES + at, page + KEY_ZEROS + at, lane);
}
__device__ __forceinline__ void load_value_limits(ValueLimits& limits, const u8* page, int block, int lane) {
    const int at = 2 * TOKENS * block;
    if (Values::CODES) limits.load(page + VALUE_SCALES + at, page + VALUE_ZEROS + at, lane);
}

__device__ __forceinline__ void load_values(Values* values, const u8* page, int block, int part, int lane) {
#pragma unroll
    for (int i = 0; i < VALUE_PART; i++) {
        const int channel = 32 * (part * VALUE_PART + i), depth = block * TOKENS;  // bytes of a row are whole words
        const int row = Values::CODES ? depth * VALUE_BITS / 8 * VALUE_DIM + 4 * channel
                                      : 2 * (depth * VALUE_DIM + channel);
        values[i].load(page + VALUES + row, lane);
    }
}

__device__ __forceinline__ void load_keys(Keys& keys, const u8* page, int block, int part, int lane) {
    const int depth = part * KEY_PART, token = block * TOKENS;
    const int at = Keys::CODES ? depth * KEY_BITS / 8 * PAGE_SIZE + 4 * token : 2 * (depth * PAGE_SIZE + token);
    keys.load(page + KEYS + at, lane);
}

// What stands beside keys in a product: queries in the order of fragments, [step of KEY_DIM, tile, lane, 2].
typedef u32 QueryMemory[KEY_DIM / 16][TILES][32][2];

__device__ __forceinline__ void add_scores(
    float (*scores)[TILES][4], const Keys& keys, int part, const QueryMemory& queries, const WarpMemory& own, int lane) {
    const int t = lane & 3;
#pragma unroll
    for (int step = 0; step < Keys::STEPS; step++) {
        u32 query[TILES][2], scale[2];
        if (Keys::CODES) in_order(scale, own.key_scales + part * KEY_PART + 4 * Keys::quad(step, t));
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const u32* b = queries[part * Keys::STEPS + step][tile][lane];
            query[tile][0] = Keys::CODES ? multiply_pairs(b[0], scale[0]) : b[0];
            query[tile][1] = Keys::CODES ? multiply_pairs(b[1], scale[1]) : b[1];
        }
#pragma unroll
        for (int i = 0; i < Keys::ROW_TILES; i++) {
            u32 a[4];
            keys.fragment(a, step, i, t);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) add_product<KEY_BITS>(scores[i][tile], a, query[tile]);
        }
    }
}

// The products of queries and a group's zeros, the same for all tokens of the block.
__device__ __forceinline__ void start_scores(
    float (*scores)[TILES][4], const QueryMemory& queries, const WarpMemory& own, int lane) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        float sums[4] = {0.f, 0.f, 0.f, 0.f};
        if (Keys::CODES) {
#pragma unroll
            for (int step = 0; step < KEY_DIM / 16; step++) {
                u32 zero[2];
                const int channel = step / Keys::STEPS * KEY_PART + 4 * Keys::quad(step % Keys::STEPS, lane & 3);
                in_order(zero, own.key_zeros + channel);
                const u32 a[4] = {zero[0], zero[0], zero[1], zero[1]};
                add_product<KEY_BITS>(sums, a, queries[step][tile][lane]);
            }
        }
#pragma unroll
        for (int i = 0; i < Keys::ROW_TILES; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) scores[i][tile][e] = sums[e];
        }
    }
}

// What a warp has summed up for its queries; lane 4 g + t has queries 8 tile + 2 t and the next. peak: of scores in
// base 2; total: of the lane's weights; page: the same of one page; sums: rows are channels; zeros: rows are SPANS.
struct State {
    float peak[TILES][2], total[TILES][2], page[TILES][2];
    float sums[SPANS][2][TILES][4], zeros[TILES][4];
};

__device__ __forceinline__ void rescale(State& state, int tile, int e, float factor) {
    state.total[tile][e] *= factor, state.page[tile][e] *= factor;
    state.zeros[tile][e] *= factor, state.zeros[tile][e + 2] *= factor;
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            state.sums[span][i][tile][e] *= factor, state.sums[span][i][tile][e + 2] *= factor;
        }
    }
}

// Make weights of the scores, and leave them in shared memory.
__device__ __forceinline__ void weigh(State& state, float (*scores)[TILES][4], WarpMemory& own, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float highest = state.peak[tile][e];
#pragma unroll
            for (int i = 0; i < Keys::ROW_TILES; i++) {
                highest = fmaxf(highest, fmaxf(scores[i][tile][e], scores[i][tile][e + 2]));
            }
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2) {
                highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, distance));
            }
            const float above = highest == -INFINITE ? 0.f : highest;  // no difference of two infinities
            rescale(state, tile, e, power_of_two(state.peak[tile][e] - above));
            state.peak[tile][e] = highest;
#pragma unroll
            for (int i = 0; i < Keys::ROW_TILES; i++) {
                const float first = power_of_two(scores[i][tile][e] - above);
                const float second = power_of_two(scores[i][tile][e + 2] - above);
                state.total[tile][e] += first + second, state.page[tile][e] += first + second;
                u16* row = own.weights[8 * tile + 2 * t + e] + Keys::WIDE * g + 2 * i;
                *reinterpret_cast<u32*>(row) = number_pair<VALUE_BITS>(first, second);
            }
        }
    }
}

__device__ __forceinline__ void add_values(
    State& state, const Values* values, int part, const WarpMemory& own, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int step = 0; step < Values::STEPS; step++) {
        const int token = 4 * Values::quad(step, t);
        u32 weights[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) in_order(weights[tile], &own.weights[8 * tile + g][token]);
        if (Values::CODES && part == 0) {
            u32 a[4] = {0, 0, 0, 0}, zero[2] = {0, 0};
            if (g < SPANS) in_order(zero, &own.value_zeros[g][token]);
            a[0] = zero[0], a[2] = zero[1];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) add_product<VALUE_BITS>(state.zeros[tile], a, weights[tile]);
        }
#pragma unroll
        for (int i = 0; i < VALUE_PART; i++) {
            const int span = part * VALUE_PART + i;
            u32 scaled[TILES][2], scale[2];
            if (Values::CODES) in_order(scale, &own.value_scales[span][token]);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                scaled[tile][0] = Values::CODES ? multiply_pairs(weights[tile][0], scale[0]) : weights[tile][0];
                scaled[tile][1] = Values::CODES ? multiply_pairs(weights[tile][1], scale[1]) : weights[tile][1];
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 a[4];
                values[i].fragment(a, step, half, t);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    add_product<VALUE_BITS>(state.sums[span][half][tile], a, scaled[tile]);
                }
            }
        }
    }
}

// oldest: the position from which on each query sees, or null.
struct Scoring {
    float scale, softcap;  // softcap 0: none
    const i64* oldest;
    int queries;  // how many there are from the first of this block on
};

// Scale scores to base 2, and hide what is dead or too old.
__device__ __forceinline__ void finish_scores(
    float (*scores)[TILES][4], const Scoring& how, u32 alive, const int* positions, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < Keys::ROW_TILES; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int token = Keys::WIDE * g + 2 * i + (e >> 1);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                float& score = scores[i][tile][e];
                score = how.softcap > 0.f ? how.softcap * LOG2_E * tanhf(score * how.scale / how.softcap)
                                          : score * (how.scale * LOG2_E);
                const int query = 8 * tile + 2 * t + (e & 1);
                bool seen = alive >> token & 1;
                if (how.oldest && query < how.queries) seen = seen && positions[token] >= how.oldest[query];
                if (!seen) score = -INFINITE;
            }
        }
    }
}

__device__ __forceinline__ float over_rows(float total) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) total += __shfl_xor_sync(~0u, total, distance);
    return total;
}

// Merge the warps' states, one after another, and write the block's outputs [QUERIES, VALUE_DIM] and log-sum-exps.
__device__ void merge_warps(State& state, float* output, float* lse, int queries) {
    __shared__ float peaks[WARPS][QUERIES], totals[WARPS][QUERIES], sums[QUERIES][VALUE_DIM + 4];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float total = over_rows(state.total[tile][e]);
            peaks[warp][8 * tile + 2 * t + e] = state.peak[tile][e];
            totals[warp][8 * tile + 2 * t + e] = total;
        }
    }
    __syncthreads();
    for (int turn = 0; turn < WARPS; turn++) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int query = 8 * tile + 2 * t + (e & 1);
                float peak = -INFINITE;
                for (int other = 0; other < WARPS; other++) peak = fmaxf(peak, peaks[other][query]);
                const float own = state.peak[tile][e & 1];
                const float factor = own == -INFINITE ? 0.f : power_of_two(own - peak);
#pragma unroll
                for (int span = 0; span < SPANS; span++) {
                    const float zero = __shfl_sync(~0u, state.zeros[tile][e & 1], 4 * span + t);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int channel = 32 * span + 4 * g + 2 * half + (e >> 1);
                        const float sum = factor * (state.sums[span][half][tile][e] + zero);
                        if (turn == warp) sums[query][channel] = turn == 0 ? sum : sums[query][channel] + sum;
                    }
                }
            }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < queries * VALUE_DIM; i += 32 * WARPS) {
        const int query = i / VALUE_DIM;
        float peak = -INFINITE, total = 0.f;
        for (int other = 0; other < WARPS; other++) peak = fmaxf(peak, peaks[other][query]);
        for (int other = 0; other < WARPS && peak != -INFINITE; other++) {
            total += totals[other][query] * power_of_two(peaks[other][query] - peak);
        }
        output[i] = total > 0.f ? sums[query][i % VALUE_DIM] / total : 0.f;
        if (i % VALUE_DIM == 0) lse[query] = total > 0.f ? (peak + log2f(total)) * LN2 : -INFINITE;
    }
}

// Where a warp is in its pages: the column, and what is needed of it before its bytes can be asked for.
struct Place {
    int column;
    const u8* page;
    u64 live;
};

// A block for each part of a table row (of x), table row (y) and 8 * TILES queries (z). slab: uint8 pages; rows int32 and
// live int64 [table rows, width]; query [table rows, queries, KEY_DIM] of floats (kind 0), F16 or BF16; oldest int64
// [table rows / heads, queries] or null. Written: output float32 [parts, table rows, queries, VALUE_DIM], lse [parts,
// table rows, queries], and unless null page_lse [table rows, queries, width].
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) attend(
    const u8* slab, const int* rows, const i64* live, const void* query, i64 kind, const i64* oldest, float* output,
    float* lse, float* page_lse, i64 width, i64 queries, i64 heads, double scale, double softcap) {
    __shared__ QueryMemory queries_in_order;
    __shared__ WarpMemory memory[WARPS];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const i64 row = blockIdx.y, first_query = static_cast<i64>(blockIdx.z) * QUERIES;
    const int count = static_cast<int>(queries - first_query < QUERIES ? queries - first_query : QUERIES);
    const int first = static_cast<int>(blockIdx.x * width / gridDim.x);
    const int last = static_cast<int>((blockIdx.x + 1ll) * width / gridDim.x);
    const i64* bounds = oldest ? oldest + row / heads * queries + first_query : nullptr;
    const Scoring how = {static_cast<float>(scale), static_cast<float>(softcap), bounds, count};
    WarpMemory& own = memory[warp];

    for (int i = threadIdx.x; i < KEY_DIM / 16 * TILES * 32; i += 32 * WARPS) {
        const int to = i & 31, tile = i / 32 % TILES, step = i / 32 / TILES, asked = 8 * tile + (to >> 2);
        const int channel = step / Keys::STEPS * KEY_PART + 4 * Keys::quad(step % Keys::STEPS, to & 3);
        float four[4] = {0.f, 0.f, 0.f, 0.f};
        for (int j = 0; j < 4 && asked < count; j++) {
            const float number = read_query(query, kind, (row * queries + first_query + asked) * KEY_DIM + channel + j);
            four[j] = KEY_BITS == BF16 ? number : fminf(fmaxf(number, -65504.f), 65504.f);
        }
        queries_in_order[step][tile][to][0] = number_pair<KEY_BITS>(four[0], four[2]);
        queries_in_order[step][tile][to][1] = number_pair<KEY_BITS>(four[1], four[3]);
    }
    __syncthreads();

    const auto place = [&](int column) {
        if (column >= last) return Place{column, nullptr, 0};
        const i64 at = row * width + column;
        return Place{column, slab + static_cast<i64>(rows[at]) * STRIDE, static_cast<u64>(live[at])};
    };
    const auto alive = [](const Place& at, int block) {
        const u32 part = static_cast<u32>(at.live >> (block * TOKENS));
        return TOKENS == 32 ? part : part & ((1u << (TOKENS & 31)) - 1);
    };
    State state;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            state.zeros[tile][e] = 0.f;
#pragma unroll
            for (int i = 0; i < 2 * SPANS; i++) state.sums[i / 2][i % 2][tile][e] = 0.f;
        }
        state.peak[tile][0] = state.peak[tile][1] = -INFINITE;
        state.total[tile][0] = state.total[tile][1] = state.page[tile][0] = state.page[tile][1] = 0.f;
    }
    Keys keys;
    Values values[VALUE_PART];
    Place now = place(first + warp), next = place(first + warp + WARPS);
    KeyLimits key_limits;
    ValueLimits value_limits;
    if (alive(now, 0)) {
        load_key_limits(key_limits, now.page, 0, lane);
        load_keys(keys, now.page, 0, 0, lane);
    }
    while (now.column < last) {
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
            const u32 tokens = alive(now, block);
            const Place& after = block + 1 < BLOCKS ? now : next;
            const int block_after = (block + 1) % BLOCKS;
            if (tokens) {
                load_value_limits(value_limits, now.page, block, lane);
                load_values(values, now.page, block, 0, lane);
                if (Keys::CODES) key_limits.store(own.key_scales, own.key_zeros, lane);
                __syncwarp();
                float scores[Keys::ROW_TILES][TILES][4];
                start_scores(scores, queries_in_order, own, lane);
                add_scores(scores, keys, 0, queries_in_order, own, lane);
#pragma unroll
                for (int part = 1; part < KEY_PARTS; part++) {
                    load_keys(keys, now.page, block, part, lane);
                    add_scores(scores, keys, part, queries_in_order, own, lane);
                }
                const int* positions = reinterpret_cast<const int*>(now.page + POSITIONS) + block * TOKENS;
                finish_scores(scores, how, tokens, positions, lane);
                if (alive(after, block_after)) {
                    load_key_limits(key_limits, after.page, block_after, lane);
                    load_keys(keys, after.page, block_after, 0, lane);
                }
                weigh(state, scores, own, lane);
                if (Values::CODES) value_limits.store(own.value_scales[0], own.value_zeros[0], lane);
                __syncwarp();
                add_values(state, values, 0, own, lane);
#pragma unroll
                for (int part = 1; part < VALUE_PARTS; part++) {
                    load_values(values, now.page, block, part, lane);
                    add_values(state, values, part, own, lane);
                }
                __syncwarp();
            } else if (alive(after, block_after)) {
                load_key_limits(key_limits, after.page, block_after, lane);
                load_keys(keys, after.page, block_after, 0, lane);
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (page_lse) {
                    const float total = over_rows(state.page[tile][e]);
                    const int asked = 8 * tile + 2 * t + e;
                    if (g == 0 && asked < count) {
                        page_lse[(row * queries + first_query + asked) * width + now.column] =
                            total > 0.f ? (state.peak[tile][e] + log2f(total)) * LN2 : -INFINITE;
                    }
                }
                state.page[tile][e] = 0.f;
            }
        }
        now = next;
        next = place(next.column + WARPS);
    }
    const i64 to = (blockIdx.x * static_cast<i64>(gridDim.y) + row) * queries + first_query;
    merge_warps(state, output + to * VALUE_DIM, lse + to, count);
}

// A block for each table row and query (x): from `parts` outputs [parts, gridDim.x, VALUE_DIM] make one.
extern "C" __global__ void merge(const float* outputs, const float* lses, float* output, float* lse, i64 parts) {
    float peak = -INFINITE, total = 0.f;
    for (i64 part = 0; part < parts; part++) peak = fmaxf(peak, lses[part * gridDim.x + blockIdx.x]);
    for (i64 part = 0; part < parts && peak != -INFINITE; part++) {
        total += power_of_two((lses[part * gridDim.x + blockIdx.x] - peak) * LOG2_E);
    }
    for (int channel = threadIdx.x; channel < VALUE_DIM; channel += blockDim.x) {
        float sum = 0.f;
        for (i64 part = 0; part < parts && peak != -INFINITE; part++) {
            const i64 at = part * gridDim.x + blockIdx.x;
            sum += power_of_two((lses[at] - peak) * LOG2_E) * outputs[at * VALUE_DIM + channel];
        }
        output[blockIdx.x * static_cast<i64>(VALUE_DIM) + channel] = total > 0.f ? sum / total : 0.f;
    }
    if (threadIdx.x == 0) lse[blockIdx.x] = total > 0.f ? peak + log2f(total) * LN2 : -INFINITE;
}
