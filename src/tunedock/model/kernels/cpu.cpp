// What stands between the matrix products, on the CPU: each kernel reads its operands once and writes its result once.
//
// Plain C functions over row-major memory; sizes in elements, bfloat16 as its 16 bits. The loops are written so that the compiler
// vectorises them for whatever machine it runs on (-march=native); nothing here is specific to one instruction set. Every kernel
// has its plain PyTorch twin in `fused` or `head.py`, and the tests hold one against the other.

#include <cstdint>
#include <cstring>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float widen(bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline float widen(float value) { return value; }

inline void narrow(float value, bfloat16 &to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // Round to nearest, ties to even. Arithmetic's own NaN (0x7fc00000) stays one.
    to.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void narrow(float value, float &to) { to = value; }

// e^x for x <= 0 or small, relative error below 2e-7 (Cephes' polynomial on [-ln2/2, ln2/2]). Branch-free, so that it vectorises.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float scaled = x * 1.44269504088896341f;
    const float whole = __builtin_floorf(scaled + 0.5f);
    float rest = x - whole * 0.693359375f;
    rest -= whole * -2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const int32_t power = (static_cast<int32_t>(whole) + 127) << 23;
    float two;
    std::memcpy(&two, &power, sizeof two);
    return sum * two;
}

inline float tangent(float x) {
    const float e = exponential(-2.0f * __builtin_fabsf(x));
    return __builtin_copysignf((1.0f - e) / (1.0f + e), x);
}

// -- the head: log p(token) of rows of logits, and its derivative by the product in place of it -----------------------------------

template <bool capped>
inline float after(float product, float scale, float cap) {
    const float logit = product * scale;
    return capped ? tangent(logit / cap) * cap : logit;
}

template <typename T, bool capped>
void chosen_row(T *row, int64_t size, int64_t token, float scale, float cap, float *logprob, bool derivative) {
    float largest = -__builtin_inff();
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < size; ++i) {
        const float product = widen(row[i]);
        largest = product > largest ? product : largest;
    }
    largest = after<capped>(largest, scale, cap);
    // Sums of 4096 terms each: one sum over 150,000 would lose digits.
    double total = 0.0;
    for (int64_t start = 0; start < size; start += 4096) {
        const int64_t end = start + 4096 < size ? start + 4096 : size;
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (int64_t i = start; i < end; ++i) part += exponential(after<capped>(widen(row[i]), scale, cap) - largest);
        total += part;
    }
    const float logsumexp = largest + static_cast<float>(__builtin_log(total));
    const float wanted = after<capped>(widen(row[token]), scale, cap);
    *logprob = wanted - logsumexp;
    if (!derivative) return;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
        const float logit = after<capped>(widen(row[i]), scale, cap);
        const float slope = capped ? scale * (1.0f - (logit / cap) * (logit / cap)) : scale;
        narrow(-slope * exponential(logit - logsumexp), row[i]);
    }
    const float slope = capped ? scale * (1.0f - (wanted / cap) * (wanted / cap)) : scale;
    narrow(slope * (1.0f - exponential(wanted - logsumexp)), row[token]);
}

template <typename T>
void chosen(T *logits, int64_t rows, int64_t size, const int64_t *tokens, float scale, float cap, float *logprobs,
            int derivative) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t n = 0; n < rows; ++n) {
        if (cap > 0.0f)
            chosen_row<T, true>(logits + n * size, size, tokens[n], scale, cap, logprobs + n, derivative != 0);
        else
            chosen_row<T, false>(logits + n * size, size, tokens[n], scale, cap, logprobs + n, derivative != 0);
    }
}

// -- RMS norm: y = x * rsqrt(mean(x^2) + eps) * (offset + w) -----------------------------------------------------------------------

template <typename T, typename W>
void norm(const T *x, const W *weight, int64_t rows, int64_t size, float eps, float offset, T *y, float *scales) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < rows; ++n) {
        const T *in = x + n * size;
        T *out = y + n * size;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < size; ++i) squares += widen(in[i]) * widen(in[i]);
        const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(size) + eps);
        scales[n] = scale;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) narrow(widen(in[i]) * scale * (offset + widen(weight[i])), out[i]);
    }
}

template <typename T, typename W>
void norm_backward(const T *grad, const T *x, const W *weight, const float *scales, int64_t rows, int64_t size, float offset,
                   T *grad_x) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < rows; ++n) {
        const T *in = x + n * size, *up = grad + n * size;
        T *out = grad_x + n * size;
        const float scale = scales[n];
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < size; ++i) along += widen(up[i]) * (offset + widen(weight[i])) * widen(in[i]);
        along *= scale * scale / static_cast<float>(size);
#pragma omp simd
        for (int64_t i = 0; i < size; ++i)
            narrow(scale * (widen(up[i]) * (offset + widen(weight[i])) - widen(in[i]) * along), out[i]);
    }
}

// -- gated activations: y = act(gate) * up -----------------------------------------------------------------------------------------

struct silu {
    static inline void at(float x, float &value, float &slope) {
        const float s = 1.0f / (1.0f + exponential(-x));
        value = x * s;
        slope = s * (1.0f + x * (1.0f - s));
    }
};

struct gelu_tanh {
    static inline void at(float x, float &value, float &slope) {
        const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        const float t = tangent(inner);
        value = 0.5f * x * (1.0f + t);
        slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608028654f * (1.0f + 0.134145f * x * x);
    }
};

constexpr int64_t BLOCK = 4096;

template <typename T, typename Act>
void gate(const T *gates, const T *ups, int64_t size, T *y) {
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t end = start + BLOCK < size ? start + BLOCK : size;
#pragma omp simd
        for (int64_t i = start; i < end; ++i) {
            float value, slope;
            Act::at(widen(gates[i]), value, slope);
            narrow(value * widen(ups[i]), y[i]);
        }
    }
}

template <typename T, typename Act>
void gate_backward(const T *grad, const T *gates, const T *ups, int64_t size, T *grad_gate, T *grad_up) {
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t end = start + BLOCK < size ? start + BLOCK : size;
#pragma omp simd
        for (int64_t i = start; i < end; ++i) {
            float value, slope;
            Act::at(widen(gates[i]), value, slope);
            const float up = widen(grad[i]);
            narrow(up * widen(ups[i]) * slope, grad_gate[i]);
            narrow(up * value, grad_up[i]);
        }
    }
}

// -- rotary embedding, the halves of a head turned against each other: y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2 ---------------

// x [tokens, heads, size] with a stride between tokens, y dense; cos and sin [tokens, size]. `back` turns the other way (backward).
template <typename T, typename C>
void rotate(const T *x, int64_t stride, const C *cosines, const C *sines, int64_t tokens, int64_t heads, int64_t size, int back, T *y) {
    const int64_t half = size / 2;
    const float sign = back ? -1.0f : 1.0f;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
        const C *c = cosines + t * size, *s = sines + t * size;
        for (int64_t h = 0; h < heads; ++h) {
            const T *in = x + t * stride + h * size;
            T *out = y + (t * heads + h) * size;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float first = widen(in[i]), second = widen(in[i + half]);
                narrow(first * widen(c[i]) - sign * second * widen(s[i]), out[i]);
                narrow(second * widen(c[i + half]) + sign * first * widen(s[i + half]), out[i + half]);
            }
        }
    }
}

// -- attention weights: softmax over the keys each query sees, which are a run that ends with the query's own ------------------------

// Scores [.., rows, columns] of a block of queries and keys among others. Queries `above` to `above + queries` of each `rows` and
// keys `left` to `left + seen` of `columns` are the block's; the last `queries` of those keys are the queries themselves, in order.
// A window of 0 is none.
struct Tile {
    int64_t rows, above, queries, columns, left, seen, window;
};

// The keys that a row sees; none where the row is not the block's.
struct Run {
    int64_t first, last;
    Run(int64_t row, const Tile &tile) {
        const int64_t query = row % tile.rows - tile.above;
        const bool within = query >= 0 && query < tile.queries;
        last = within ? tile.left + tile.seen - tile.queries + query + 1 : 0;
        first = within ? tile.left : 0;
        if (tile.window > 0 && last - first > tile.window) first = last - tile.window;
    }
};

template <typename T>
inline void clear_outside(T *row, Run run, int64_t columns) {
    std::memset(row, 0, static_cast<size_t>(run.first) * sizeof(T));
    std::memset(row + run.last, 0, static_cast<size_t>(columns - run.last) * sizeof(T));
}

template <typename T>
inline void weigh_row(T *scores, Run run, int64_t columns, float scale) {
    float largest = -__builtin_inff();
#pragma omp simd reduction(max : largest)
    for (int64_t i = run.first; i < run.last; ++i) {
        const float score = widen(scores[i]);
        largest = score > largest ? score : largest;
    }
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = run.first; i < run.last; ++i) total += exponential((widen(scores[i]) - largest) * scale);
    const float share = 1.0f / total;
#pragma omp simd
    for (int64_t i = run.first; i < run.last; ++i) narrow(exponential((widen(scores[i]) - largest) * scale) * share, scores[i]);
    clear_outside(scores, run, columns);
}

// Weights take the place of the scores of `all` rows; scale > 0.
template <typename T>
void weigh(T *scores, int64_t all, Tile tile, float scale) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < all; ++n) weigh_row(scores + n * tile.columns, Run(n, tile), tile.columns, scale);
}

// The same, and in place of d loss / d weight the derivative by the score.
template <typename T>
void weigh_backward(T *scores, T *grad, int64_t all, Tile tile, float scale) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < all; ++n) {
        const Run run(n, tile);
        T *weights = scores + n * tile.columns, *slopes = grad + n * tile.columns;
        weigh_row(weights, run, tile.columns, scale);
        float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
        for (int64_t i = run.first; i < run.last; ++i) mean += widen(weights[i]) * widen(slopes[i]);
#pragma omp simd
        for (int64_t i = run.first; i < run.last; ++i)
            narrow(scale * widen(weights[i]) * (widen(slopes[i]) - mean), slopes[i]);
        clear_outside(slopes, run, tile.columns);
    }
}

// -- attention of one query a row over keys and values in pages (generation, `serve.engines.paged`) --------------------------------

// A page holds [heads, tokens, size] of keys and of values; a row's pages are listed in its line of `table`.
struct Pages {
    const int32_t *table;
    int64_t columns, tokens, heads, key_size, value_size;
};

// The query heads of one key head, each over the last `seen` of a row's `length` tokens. scores [group, seen], sums [group, value_size].
template <typename T>
void attend_group(const T *queries, int64_t stride, int64_t group, const T *keys, const T *values, const Pages &pages,
                  const int32_t *list, int64_t head, int64_t length, int64_t seen, float scale, float cap, const float *sinks,
                  float *scores, float *wide, float *sums, T *out, int64_t out_stride) {
    const int64_t first = length - seen, size = pages.key_size, depth = pages.value_size;
    for (int64_t g = 0; g < group; ++g)
        for (int64_t d = 0; d < size; ++d) wide[g * size + d] = widen(queries[g * stride + d]) * scale;
    for (int64_t t = first; t < length; ++t) {
        const T *key = keys + ((list[t / pages.tokens] * pages.heads + head) * pages.tokens + t % pages.tokens) * size;
        for (int64_t g = 0; g < group; ++g) {
            const float *query = wide + g * size;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < size; ++d) sum += query[d] * widen(key[d]);
            scores[g * seen + t - first] = cap > 0.0f ? tangent(sum / cap) * cap : sum;
        }
    }
    for (int64_t g = 0; g < group; ++g) {
        float *row = scores + g * seen;
        float largest = sinks ? sinks[g] : -__builtin_inff();
#pragma omp simd reduction(max : largest)
        for (int64_t t = 0; t < seen; ++t) largest = row[t] > largest ? row[t] : largest;
        float total = sinks ? exponential(sinks[g] - largest) : 0.0f;
#pragma omp simd reduction(+ : total)
        for (int64_t t = 0; t < seen; ++t) total += row[t] = exponential(row[t] - largest);
        const float share = 1.0f / total;
#pragma omp simd
        for (int64_t t = 0; t < seen; ++t) row[t] *= share;
    }
    std::memset(sums, 0, sizeof(float) * group * depth);
    for (int64_t t = first; t < length; ++t) {
        const T *value = values + ((list[t / pages.tokens] * pages.heads + head) * pages.tokens + t % pages.tokens) * depth;
        for (int64_t g = 0; g < group; ++g) {
            const float weight = scores[g * seen + t - first];
            float *sum = sums + g * depth;
#pragma omp simd
            for (int64_t d = 0; d < depth; ++d) sum[d] += weight * widen(value[d]);
        }
    }
    for (int64_t g = 0; g < group; ++g)
        for (int64_t d = 0; d < depth; ++d) narrow(sums[g * depth + d], out[g * out_stride + d]);
}

template <typename T>
void recall(const T *queries, int64_t token_stride, int64_t head_stride, const int64_t *at, const int64_t *lengths, int64_t rows,
            int64_t heads, const T *keys, const T *values, const Pages &pages, int64_t window, float scale, float cap,
            const float *sinks, float *room, int64_t room_size, T *out) {
    const int64_t group = heads / pages.heads;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t job = 0; job < rows * pages.heads; ++job) {
        const int64_t row = job / pages.heads, head = job % pages.heads, token = at[row], length = lengths[row];
        const int64_t seen = window > 0 && window < length ? window : length;
        float *wide = room + job * room_size, *sums = wide + group * pages.key_size, *scores = sums + group * pages.value_size;
        attend_group(queries + token * token_stride + head * group * head_stride, head_stride, group, keys, values, pages,
                     pages.table + row * pages.columns, head, length, seen, scale, cap, sinks ? sinks + head * group : nullptr,
                     scores, wide, sums, out + (token * heads + head * group) * pages.value_size, pages.value_size);
    }
}

// -- products of few rows with a large matrix (generation): y = x W^T, each row of W read once -------------------------------------

// Sixteen numbers at a time, in whatever registers there are. What a row of x gives does not depend on the rows beside it: every
// product is summed in the same order.
typedef float wide16 __attribute__((vector_size(64)));
typedef uint16_t half16 __attribute__((vector_size(32)));
typedef uint32_t bits16 __attribute__((vector_size(64)));

inline wide16 load16(const float *from) {
    wide16 loaded;
    std::memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

inline wide16 load16(const bfloat16 *from) {
    half16 halves;
    std::memcpy(&halves, from, sizeof halves);
    const bits16 bits = __builtin_convertvector(halves, bits16) << 16;
    wide16 loaded;
    std::memcpy(&loaded, &bits, sizeof loaded);
    return loaded;
}

inline float sum16(wide16 x) {
    float parts[16], sum = 0.0f;
    std::memcpy(parts, &x, sizeof parts);
    for (int i = 0; i < 8; ++i) parts[i] += parts[i + 8];
    for (int i = 0; i < 4; ++i) parts[i] += parts[i + 4];
    sum = (parts[0] + parts[2]) + (parts[1] + parts[3]);
    return sum;
}

// Of a product, what is worked on at once: up to TALL rows of x and WIDE of W, whose sums stay in registers, over SPAN numbers of each,
// so that both stay in the nearest cache. Rows of W lie a power of two apart, which caches hold few of; what of x is read again and
// again is therefore laid out anew, sixteen numbers of each of a tile's rows in turn.
constexpr int TALL = 6, WIDE = 4, MOST_ROWS = 64;
constexpr int64_t SPAN = 512;

// Rows of the strip after the next that are fetched meanwhile: each tile's turn fetches its part of them, so that memory is as busy as
// the arithmetic all the time.
struct Part {
    int from, to;
};

template <int M, int N, typename T>
inline void tile_product(const float *x, const T *weight, int64_t size, int64_t span, Part ahead, wide16 *kept) {
    wide16 sums[M][N];
    std::memcpy(sums, kept, sizeof sums);
    for (int64_t k = 0; k < span; k += 16, x += 16 * M) {
        wide16 rows[N];
        for (int n = 0; n < N; ++n) rows[n] = load16(weight + n * size + k);
        for (int n = ahead.from; n < ahead.to; ++n) __builtin_prefetch(weight + (n + 2 * N) * size + k, 0, 2);
        for (int m = 0; m < M; ++m) {
            const wide16 given = load16(x + 16 * m);
            for (int n = 0; n < N; ++n) sums[m][n] += given * rows[n];
        }
    }
    std::memcpy(kept, sums, sizeof sums);
}

template <int N, typename T>
inline void tile_of(int rows, const float *x, const T *weight, int64_t size, int64_t span, Part ahead, wide16 *kept) {
    switch (rows) {
        case 6: return tile_product<6, N>(x, weight, size, span, ahead, kept);
        case 5: return tile_product<5, N>(x, weight, size, span, ahead, kept);
        case 4: return tile_product<4, N>(x, weight, size, span, ahead, kept);
        case 3: return tile_product<3, N>(x, weight, size, span, ahead, kept);
        case 2: return tile_product<2, N>(x, weight, size, span, ahead, kept);
        case 1: return tile_product<1, N>(x, weight, size, span, ahead, kept);
    }
}

// Rows in tiles as even as can be: tile t has those from starts[t] to starts[t + 1].
struct Tiles {
    int number, starts[MOST_ROWS / TALL + 2];

    explicit Tiles(int rows) : number((rows + TALL - 1) / TALL) {
        for (int t = 0; t <= number; ++t) starts[t] = rows * t / number;
    }
    int rows(int t) const { return starts[t + 1] - starts[t]; }
};

template <int N, typename T>
inline void strip(const float *laid, const Tiles &tiles, const T *weight, int64_t size, T *y, int64_t columns) {
    wide16 sums[MOST_ROWS * N];
    std::memset(sums, 0, static_cast<size_t>(tiles.starts[tiles.number]) * N * sizeof *sums);
    for (int64_t k = 0; k < size; k += SPAN) {
        const int64_t span = size - k < SPAN ? size - k : SPAN;
        for (int t = 0; t < tiles.number; ++t)
            tile_of<N>(tiles.rows(t), laid + tiles.starts[t] * size + k * tiles.rows(t), weight + k, size, span,
                       Part{N * t / tiles.number, N * (t + 1) / tiles.number}, sums + tiles.starts[t] * N);
    }
    for (int m = 0; m < tiles.starts[tiles.number]; ++m)
        for (int n = 0; n < N; ++n) narrow(sum16(sums[m * N + n]), y[m * columns + n]);
}

// x [rows, size], laid [rows, size]: room; at most MOST_ROWS rows.
template <typename T>
void few_at_once(const float *x, int rows, const T *weight, int64_t columns, int64_t size, float *laid, T *y) {
    const Tiles tiles(rows);
    for (int t = 0; t < tiles.number; ++t) {
        float *to = laid + tiles.starts[t] * size;
        for (int64_t k = 0; k < size; k += 16)
            for (int m = tiles.starts[t]; m < tiles.starts[t + 1]; ++m, to += 16) std::memcpy(to, x + m * size + k, 16 * sizeof(float));
    }
    const int64_t strips = (columns + WIDE - 1) / WIDE;
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < strips; ++s) {
        const int64_t n = WIDE * s;
        if (n + WIDE <= columns) {
            strip<WIDE>(laid, tiles, weight + n * size, size, y + n, columns);
        } else {
            for (int64_t one = n; one < columns; ++one) strip<1>(laid, tiles, weight + one * size, size, y + one, columns);
        }
    }
}

template <typename T>
void few(const float *x, int64_t rows, const T *weight, int64_t columns, int64_t size, float *laid, T *y) {
    for (; rows > 0; rows -= MOST_ROWS, x += MOST_ROWS * size, y += MOST_ROWS * columns)
        few_at_once(x, static_cast<int>(rows < MOST_ROWS ? rows : MOST_ROWS), weight, columns, size, laid, y);
}

}  // namespace

extern "C" {

// logits [rows, size], tokens and logprobs [rows]. With `derivative`, d logprob / d product overwrites the logits. cap 0: none.
void tunedock_chosen_bf16(void *logits, int64_t rows, int64_t size, const int64_t *tokens, float scale, float cap, float *logprobs,
                          int derivative) {
    chosen(static_cast<bfloat16 *>(logits), rows, size, tokens, scale, cap, logprobs, derivative);
}

void tunedock_chosen_f32(void *logits, int64_t rows, int64_t size, const int64_t *tokens, float scale, float cap, float *logprobs,
                         int derivative) {
    chosen(static_cast<float *>(logits), rows, size, tokens, scale, cap, logprobs, derivative);
}

#define TUNEDOCK_KERNELS(NAME, T)                                                                                                  \
    void tunedock_norm_##NAME(const void *x, const void *weight, int64_t rows, int64_t size, float eps, float offset, void *y,     \
                              float *scales) {                                                                                     \
        norm(static_cast<const T *>(x), static_cast<const T *>(weight), rows, size, eps, offset, static_cast<T *>(y), scales);     \
    }                                                                                                                              \
    void tunedock_norm_backward_##NAME(const void *grad, const void *x, const void *weight, const float *scales, int64_t rows,     \
                                       int64_t size, float offset, void *grad_x) {                                                 \
        norm_backward(static_cast<const T *>(grad), static_cast<const T *>(x), static_cast<const T *>(weight), scales, rows, size, \
                      offset, static_cast<T *>(grad_x));                                                                           \
    }                                                                                                                              \
    void tunedock_silu_##NAME(const void *gates, const void *ups, int64_t size, void *y) {                                         \
        gate<T, silu>(static_cast<const T *>(gates), static_cast<const T *>(ups), size, static_cast<T *>(y));                      \
    }                                                                                                                              \
    void tunedock_silu_backward_##NAME(const void *grad, const void *gates, const void *ups, int64_t size, void *grad_gate,        \
                                       void *grad_up) {                                                                            \
        gate_backward<T, silu>(static_cast<const T *>(grad), static_cast<const T *>(gates), static_cast<const T *>(ups), size,     \
                               static_cast<T *>(grad_gate), static_cast<T *>(grad_up));                                            \
    }                                                                                                                              \
    void tunedock_gelu_tanh_##NAME(const void *gates, const void *ups, int64_t size, void *y) {                                    \
        gate<T, gelu_tanh>(static_cast<const T *>(gates), static_cast<const T *>(ups), size, static_cast<T *>(y));                 \
    }                                                                                                                              \
    void tunedock_gelu_tanh_backward_##NAME(const void *grad, const void *gates, const void *ups, int64_t size, void *grad_gate,   \
                                            void *grad_up) {                                                                       \
        gate_backward<T, gelu_tanh>(static_cast<const T *>(grad), static_cast<const T *>(gates), static_cast<const T *>(ups),      \
                                    size, static_cast<T *>(grad_gate), static_cast<T *>(grad_up));                                 \
    }                                                                                                                              \
    void tunedock_rotate_##NAME(const void *x, int64_t stride, const void *cosines, const void *sines, int64_t tokens,             \
                                int64_t heads, int64_t size, int back, void *y) {                                                  \
        rotate(static_cast<const T *>(x), stride, static_cast<const T *>(cosines), static_cast<const T *>(sines), tokens, heads,   \
               size, back, static_cast<T *>(y));                                                                                   \
    }                                                                                                                              \
    void tunedock_few_##NAME(const float *x, int64_t rows, const void *weight, int64_t columns, int64_t size, float *laid,         \
                             void *y) {                                                                                            \
        few(x, rows, static_cast<const T *>(weight), columns, size, laid, static_cast<T *>(y));                                    \
    }                                                                                                                              \
    void tunedock_recall_##NAME(const void *queries, int64_t token_stride, int64_t head_stride, const int64_t *at,                 \
                                const int64_t *lengths, int64_t rows, int64_t heads, const void *keys, const void *values,         \
                                const int32_t *table, int64_t columns, int64_t tokens, int64_t key_heads, int64_t key_size,        \
                                int64_t value_size, int64_t window, float scale, float cap, const float *sinks, float *room,       \
                                int64_t room_size, void *out) {                                                                    \
        recall(static_cast<const T *>(queries), token_stride, head_stride, at, lengths, rows, heads, static_cast<const T *>(keys), \
               static_cast<const T *>(values), Pages{table, columns, tokens, key_heads, key_size, value_size}, window, scale, cap, \
               sinks, room, room_size, static_cast<T *>(out));                                                                     \
    }                                                                                                                              \
    void tunedock_weigh_##NAME(void *scores, int64_t all, int64_t rows, int64_t above, int64_t queries, int64_t columns,           \
                               int64_t left, int64_t seen, int64_t window, float scale) {                                          \
        weigh(static_cast<T *>(scores), all, Tile{rows, above, queries, columns, left, seen, window}, scale);                      \
    }                                                                                                                              \
    void tunedock_weigh_backward_##NAME(void *scores, void *grad, int64_t all, int64_t rows, int64_t above, int64_t queries,       \
                                        int64_t columns, int64_t left, int64_t seen, int64_t window, float scale) {                \
        weigh_backward(static_cast<T *>(scores), static_cast<T *>(grad), all,                                                      \
                       Tile{rows, above, queries, columns, left, seen, window}, scale);                                            \
    }

TUNEDOCK_KERNELS(bf16, bfloat16)
TUNEDOCK_KERNELS(f32, float)

}  // extern "C"
