/* The update rules of distopt/optim on float32 tensors on the CPU, with as few reads and writes of an element as possible.
 *
 * A call walks over many tensors in pieces that the threads share. `table` and `scales` are stored column by column, with
 * one value for each tensor. The columns of `table`: lengths, the lengths of a row (the elements of one index along the
 * layer's dimension 0), then the addresses of weights, gradients (of bfloat16, the upper half of a float32, with the flag
 * HALF) and up to three state buffers. With the flag NARROW weights and state have other forms (formats.c), whose columns
 * follow; then STEP and MEASURE are the only modes, and MEASURE changes nothing. The columns of `scales`: values that differ between tensors, then the factor of the direction,
 * and last that of the gradient, whose product with each element is rounded as if it had been stored. `mode`:
 *   STEP        updates state and weights;
 *   MEASURE     updates the state, and adds up the squares of each tensor's weights and of its direction;
 *   APPLY       computes the same direction again, from the state, and updates the weights;
 *   KEEP        as MEASURE, and stores the direction where the gradient was (not of bfloat16);
 *   APPLY_KEPT  updates the weights by the direction that KEEP has stored.
 * So a layer whose full direction has to be known before its first weight changes (LAMB) needs no memory for it. KEEP reads
 * six values of an element instead of seven; a read costs five times as much as a write.
 *
 * A multiply-add is fused where it says fmaf, and nowhere else: an element has the same bits wherever its shard ends.
 *
 * Scalars h and scales s have the names of the rule's specification (distopt/kernels/rules.py): `<rule>__<name>` is an
 * index, in an enum that distopt/kernels/build.py derives from this file and puts before it.
 *
 * Sums are the same bits however a layer is sharded by rows, in any pieces and at any number of threads: blocks of a
 * row's elements are summed in one order, and these sums are added without any rounding (distopt/kernels/exact.py).
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { STEP, MEASURE, APPLY, KEEP, APPLY_KEPT, SUM, SUM_KEEP }; /* SUM: as MEASURE, of one block */
enum { HALF = 1, NARROW = 2 }; /* flags */
enum { PIECE = 8192, WAVE = 2048, HYPER = 7, SCALES = 4, RATIO = 2, FACTOR = 3 };
enum { BLOCK = 512, LANES = 32, SHORT = 64, TINY = 8 }; /* elements of a sum, its chains, of short rows */
#define INFINITE 0x7ff0000000000000ll
enum { DIGITS = 16, WIDTH = 38, LOWEST = -304 };   /* of an exact sum, as distopt/kernels/exact.py has them */

typedef struct { int64_t tensor, start, numel; } Piece;
/* An exact sum: digit i counts units of 2^(WIDTH i + LOWEST); `broken` is 0, or the inf or nan that was added. */
typedef struct { int64_t digit[DIGITS + 2]; double broken; } Sum;
/* A digit of the result: an integer while adding up, a float64 in the end. The last one is 0, or not finite. */
typedef union { int64_t count; double value; } Word;
typedef struct { Word digit[DIGITS + 1]; } Total;

typedef void Rows(int mode, const float *hyper, const float *scales, float *restrict p, float *restrict g,
                  float *restrict a, float *restrict b, float *restrict c, int64_t n, float *restrict direction);

/* Returns a + weight (g - a), exact at weight 0 and at weight 1; rest = 1 - weight. */
static inline float lerp(float a, float g, float weight, float rest) {
    const float distance = g - a;
    return weight < 0.5f ? fmaf(weight, distance, a) : fmaf(-rest, distance, g);
}

/* A rule's `update` updates its state and returns the direction; `again` computes it again, from the new state. */
static inline float sgd_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    return s[sgd__ratio] * (g + h[sgd__weight_decay] * p);
}
static inline float sgd_update(const float *h, const float *s, float p, float g, float *a, float *b, float *c) {
    return sgd_again(h, s, p, g, 0.0f, 0.0f, 0.0f);
}

static inline float momentum_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    return a;
}
static inline float momentum_update(const float *h, const float *s, float p, float g, float *a, float *b, float *c) {
    return *a = h[momentum__momentum] * *a + s[momentum__one_minus_dampening] * (s[momentum__ratio] * (g + h[momentum__weight_decay] * p));
}

static inline float nesterov_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    return s[nesterov__ratio] * (g + h[nesterov__weight_decay] * p) + h[nesterov__momentum] * a;
}
static inline float nesterov_update(const float *h, const float *s, float p, float g, float *a, float *b, float *c) {
    g = s[nesterov__ratio] * (g + h[nesterov__weight_decay] * p);
    *a = h[nesterov__momentum] * *a + s[nesterov__one_minus_dampening] * g;
    return g + h[nesterov__momentum] * *a;
}

static inline float adam_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    const float scaled = a * s[adam__inverse_bias_correction1] / fmaf(sqrtf(b), s[adam__inverse_bias_correction2_sqrt], h[adam__eps]);
    return fmaf(h[adam__decoupled], p, scaled);
}
static inline float adam_update(const float *h, const float *s, float p, float g, float *a, float *b, float *c) {
    g = fmaf(h[adam__coupled], p, g);
    *a = lerp(*a, g, h[adam__one_minus_beta1], h[adam__beta1]);
    *b = fmaf(h[adam__beta2], *b, h[adam__one_minus_beta2] * (g * g));
    return adam_again(h, s, p, g, *a, *b, 0.0f);
}

static inline float adagrad_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    return (g + h[adagrad__weight_decay] * p) * s[adagrad__inverse_rate_decay] / (sqrtf(a) + h[adagrad__eps]);
}
static inline float adagrad_update(const float *h, const float *s, float p, float g, float *a, float *b, float *c) {
    float decayed = g + h[adagrad__weight_decay] * p;
    *a += decayed * decayed;
    return adagrad_again(h, s, p, g, *a, 0.0f, 0.0f);
}

/* RMSprop's four kernels have the same scalars. Their buffers, those that exist: squares, means, momentum. */
static inline float rmsprop_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    return (g + h[rmsprop__weight_decay] * p) / (sqrtf(a) + h[rmsprop__eps]);
}
static inline float rmsprop_update(const float *h, const float *s, float p, float g, float *a, float *b, float *c) {
    float decayed = g + h[rmsprop__weight_decay] * p;
    *a = h[rmsprop__alpha] * *a + h[rmsprop__one_minus_alpha] * (decayed * decayed);
    return decayed / (sqrtf(*a) + h[rmsprop__eps]);
}
static inline float rmsprop_centered_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    const float variance = a - b * b; /* of a constant gradient rounded below 0 */
    return (g + h[rmsprop__weight_decay] * p) / (sqrtf(variance < 0.0f ? 0.0f : variance) + h[rmsprop__eps]);
}
static inline float rmsprop_centered_update(const float *h, const float *s, float p, float g, float *a, float *b,
                                            float *c) {
    float decayed = g + h[rmsprop__weight_decay] * p;
    *a = h[rmsprop__alpha] * *a + h[rmsprop__one_minus_alpha] * (decayed * decayed);
    *b = lerp(*b, decayed, h[rmsprop__one_minus_alpha], h[rmsprop__alpha]);
    return rmsprop_centered_again(h, s, p, g, *a, *b, 0.0f);
}
static inline float rmsprop_momentum_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    return b;
}
static inline float rmsprop_momentum_update(const float *h, const float *s, float p, float g, float *a, float *b,
                                            float *c) {
    return *b = h[rmsprop__momentum] * *b + rmsprop_update(h, s, p, g, a, 0, 0);
}
static inline float rmsprop_centered_momentum_again(const float *h, const float *s, float p, float g, float a, float b,
                                                    float c) {
    return c;
}
static inline float rmsprop_centered_momentum_update(const float *h, const float *s, float p, float g, float *a,
                                                     float *b, float *c) {
    return *c = h[rmsprop__momentum] * *c + rmsprop_centered_update(h, s, p, g, a, b, 0);
}

/* The sum of a[i] b[i], always in the same order: in float32, whose squares are from 1e-38 to 1e38, or else in float64. */
static double dot(const float *a, const float *b, int64_t n) {
    float lane[LANES] = {0.0f};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) lane[k] = fmaf(a[i + k], b[i + k], lane[k]);
    for (int k = 0; i + k < n; k++) lane[k] = fmaf(a[i + k], b[i + k], lane[k]);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int k = 0; k < width; k++) lane[k] += lane[k + width];
    if (fabsf(lane[0]) > 1e-20f && fabsf(lane[0]) < 1e37f) return lane[0];
    double wide = 0.0;
    for (i = 0; i < n; i++) wide += (double)a[i] * (double)b[i];
    return wide;
}

/* Adds an integer times 2^(place + LOWEST) exactly; at most 2^24 of them until `carry`. */
static inline void add_integer(Sum *sum, int64_t sign, uint64_t integer, int place) {
    const uint64_t mask = (1ull << WIDTH) - 1;
    const unsigned __int128 wide = (unsigned __int128)integer << place % WIDTH;
    int64_t *digit = sum->digit + place / WIDTH;
    digit[0] += sign * (int64_t)((uint64_t)wide & mask);
    digit[1] += sign * (int64_t)((uint64_t)(wide >> WIDTH) & mask);
    digit[2] += sign * (int64_t)(uint64_t)(wide >> 2 * WIDTH);
}

/* Adds a sum of products of float32 exactly. */
static inline void add(Sum *sum, double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    const int exponent = bits >> 52 & 0x7ff;
    if (exponent == 0) return; /* less than 2^-1022 is 0 here */
    if (exponent == 0x7ff) {
        sum->broken += value;
        return;
    }
    uint64_t mantissa = (bits & ((1ull << 52) - 1)) | 1ull << 52;
    int place = exponent - 1075 - LOWEST; /* of its last bit */
    if (place < 0) {                      /* below which all bits are 0, since those of a product are */
        mantissa = place > -64 ? mantissa >> -place : 0;
        place = 0;
    }
    add_integer(sum, bits >> 63 ? -1 : 1, mantissa, place);
}

/* The bits of |value|, which are in the order of the values; those of inf and nan are at least INFINITE. */
static inline int64_t magnitude(double value) {
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & INT64_MAX;
}

/* Adds the products of at most CHUNK elements exactly, whatever their order: digit by digit, from that of the largest one
 * down. Adding and subtracting 1.5 * 2^52 units rounds each to units of the digit; what is left goes to the next. */
static void add_each(Sum *sum, const float *a, const float *b, int64_t n) {
    double left[CHUNK];
    int64_t largest = 0;
    _Pragma("omp simd reduction(max : largest)")
    for (int64_t i = 0; i < n; i++) {
        left[i] = (double)a[i] * (double)b[i]; /* exact */
        const int64_t bits = magnitude(left[i]);
        largest = bits > largest ? bits : largest;
    }
    for (int64_t i = 0; largest >= INFINITE && i < n; i++)
        if (magnitude(left[i]) >= INFINITE) {
            sum->broken += left[i];
            left[i] = 0.0;
        }
    for (int digit = DIGITS; largest > 0;) {
        const int top = ((int)(largest >> 52) - 1023 - LOWEST) / WIDTH;
        digit = top < digit ? top : digit - 1;
        const double unit = ldexp(1.0, digit * WIDTH + LOWEST), rounder = 1.5 * 0x1p52 * unit;
        double total = 0.0;
        largest = 0;
        _Pragma("omp simd reduction(max : largest) reduction(+ : total)")
        for (int64_t i = 0; i < n; i++) {
            const double rounded = (left[i] + rounder) - rounder;
            left[i] -= rounded;
            total += rounded;
            const int64_t bits = magnitude(left[i]);
            largest = bits > largest ? bits : largest;
        }
        sum->digit[digit] += (int64_t)(total / unit); /* exact: at most 2^(WIDTH + 10) units */
    }
}

/* Carries, so that every digit but the last is in [0, 2^WIDTH). */
static void carry(Sum *sum) {
    for (int i = 0; i + 1 < DIGITS; i++) {
        const int64_t more = sum->digit[i] >> WIDTH;
        sum->digit[i + 1] += more;
        sum->digit[i] -= more * ((int64_t)1 << WIDTH);
    }
}

/* Returns the length of the next block, given what is left of the row and of the shard. */
static inline int64_t block(int64_t row, int64_t shard) {
    const int64_t count = row < BLOCK ? row : BLOCK;
    return count < shard ? count : shard;
}

/* Adds the products of n elements, the first of which is element `from` of its tensor, in blocks of rows of length `row`. */
static void add_products(Sum *sum, const float *a, const float *b, int64_t from, int64_t n, int64_t row) {
    if (row < TINY) { /* a block sum of so few elements does not pay */
        for (int64_t i = 0; i < n; i += CHUNK) add_each(sum, a + i, b + i, n - i < CHUNK ? n - i : CHUNK);
        return;
    }
    int64_t left = row - from % row; /* what is left of the row */
    for (int64_t i = 0; i < n;) {
        const int64_t count = block(left, n - i);
        add(sum, dot(a + i, b + i, count));
        i += count;
        left = left == count ? row : left - count;
    }
}

static void merge(Total *total, Sum *sum) {
    carry(sum);
    for (int i = 0; i < DIGITS; i++)
        if (sum->digit[i] != 0) {
#pragma omp atomic
            total->digit[i].count += sum->digit[i];
        }
    if (sum->broken != 0.0) {
#pragma omp atomic
        total->digit[DIGITS].value += sum->broken;
    }
}

/* Converts the digits to float64. */
static void finish(Total *total) {
    Sum sum = {{0}, total->digit[DIGITS].value};
    for (int i = 0; i < DIGITS; i++) sum.digit[i] = total->digit[i].count;
    carry(&sum);
    for (int i = 0; i < DIGITS; i++) total->digit[i].value = sum.broken != 0.0 ? sum.broken : (double)sum.digit[i];
}

/* Returns how many of n elements from `from` on fill blocks of rows of length `row`; n if no others follow. */
static int64_t full_blocks(int64_t from, int64_t n, int64_t left, int64_t row) {
    return n == left ? n : n - (from + n) % row % BLOCK;
}

/* Writes up to WAVE pieces, starting at `at`, advances `at` past them, and returns their number. */
static int64_t next_pieces(const int64_t *numel, const int64_t *row, int64_t tensors, Piece *at, Piece *pieces) {
    int64_t count = 0;
    while (at->tensor < tensors && count < WAVE) {
        const int64_t left = numel[at->tensor] - at->start;
        const int64_t size = full_blocks(at->start, left < PIECE ? left : PIECE, left, row[at->tensor]);
        if (left > 0) pieces[count++] = (Piece){at->tensor, at->start, size};
        if (left > size)
            at->start += size;
        else
            *at = (Piece){at->tensor + 1, 0, 0};
    }
    return count;
}

/* Reads where and how weights and state of a tensor are stored. */
static Window find(const int64_t *table, int64_t tensors, int64_t tensor, Store *stores) {
    static const int addresses[STORES] = {2, 4, 5, 6}; /* of the weights and of up to three buffers */
    const int64_t *own = table + tensor;
    for (int i = 0; i < STORES; i++)
        stores[i] = (Store){(char *)own[addresses[i] * tensors], (char *)own[(7 + i) * tensors],
                            own[(7 + STORES + i) * tensors], (uint32_t)own[(7 + 2 * STORES + i) * tensors]};
    own += (7 + 3 * STORES) * tensors;
    return (Window){own[0], own[tensors], own[2 * tensors], 0};
}

/* Calls `rows` on every chunk of every piece. totals: for each tensor the sums of weights and of directions. */
static void walk(Rows *rows, const int64_t *table, const float *scales, Total *totals, int64_t tensors,
                 const float *hyper, int flags, int mode, int threads) {
    const int half = flags & HALF, narrow = flags & NARROW;
    Piece pieces[WAVE];
    Piece at = {0, 0, 0};
    const int64_t *lengths = table + tensors;
    for (int64_t count; (count = next_pieces(table, lengths, tensors, &at, pieces));) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 1)
        for (int64_t k = 0; k < count; k++) {
            const int64_t tensor = pieces[k].tensor, end = pieces[k].start + pieces[k].numel, row = lengths[tensor];
            char *column[5] = {0};
            for (int i = 0; i < 5; i++) column[i] = (char *)table[(i + 2) * tensors + tensor];
            float s[SCALES], widened[CHUNK], direction[CHUNK], read[STORES][CHUNK];
            Store stores[STORES];
            const Window window = narrow ? find(table, tensors, tensor, stores) : (Window){0, 1, 1, 0};
            for (int i = 0; i < SCALES; i++) s[i] = scales[i * tensors + tensor];
            Sum weights = {{0}, 0.0}, updates = {{0}, 0.0};
            const int measures = mode == MEASURE || mode == KEEP;
            const int by_block = measures && row >= SHORT; /* a shorter one is not worth a call */
            int64_t left = row - pieces[k].start % row; /* of the row, block by block */
            for (int64_t from = pieces[k].start, n; from < end; from += n) {
                if (by_block) {
                    n = block(left, end - from);
                    left = left == n ? row : left - n;
                } else {
                    n = full_blocks(from, end - from < CHUNK ? end - from : CHUNK, end - from, row);
                }
                if (half) widen((uint16_t *)column[1] + from, widened, n);
                float *p = (float *)column[0] + from, *g = half ? widened : (float *)column[1] + from;
                float *state[] = {(float *)column[2] + from, (float *)column[3] + from, (float *)column[4] + from};
                for (int i = 0; narrow && i < STORES; i++) {
                    if (stores[i].data == 0 || (stores[i].format == FLOAT32 && mode == STEP)) continue;
                    load(stores + i, from, n, row, read[i]);
                    *(i == 0 ? &p : state + i - 1) = read[i];
                }
                rows(!by_block ? mode : mode == KEEP ? SUM_KEEP : SUM, hyper, s, p, g, state[0], state[1], state[2], n,
                     direction);
                for (int i = 0; narrow && mode == STEP && i < STORES; i++)
                    if (stores[i].data != 0) save(stores + i, window, from, n, row, read[i]);
                if (by_block) {
                    add(&weights, direction[0]);
                    add(&updates, direction[1]);
                } else if (measures) {
                    add_products(&weights, p, p, from, n, row);
                    add_products(&updates, direction, direction, from, n, row);
                    if (mode == KEEP) memcpy(g, direction, n * sizeof *g);
                }
            }
            if (measures) {
                merge(totals + 2 * tensor, &weights);
                merge(totals + 2 * tensor + 1, &updates);
            }
        }
    }
    for (int64_t i = 0; (mode == MEASURE || mode == KEEP) && i < 2 * tensors; i++) finish(totals + i);
}

/* Computes inner products of pairs of tensors, columns 3 and 4 of the table, in float32, or in bfloat16 if `half`. */
void products(const int64_t *table, Total *totals, int64_t tensors, int half, int threads) {
    Piece pieces[WAVE];
    Piece at = {0, 0, 0};
    const int64_t *lengths = table + tensors;
    for (int64_t count; (count = next_pieces(table, lengths, tensors, &at, pieces));) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 1)
        for (int64_t k = 0; k < count; k++) {
            const int64_t tensor = pieces[k].tensor, start = pieces[k].start, numel = pieces[k].numel;
            char *a = (char *)table[2 * tensors + tensor], *b = (char *)table[3 * tensors + tensor];
            float wide_a[PIECE], wide_b[PIECE];
            if (half) {
                widen((uint16_t *)a + start, wide_a, numel);
                if (b != a) widen((uint16_t *)b + start, wide_b, numel);
            }
            Sum sum = {{0}, 0.0};
            const float *left = half ? wide_a : (float *)a + start;
            const float *right = b == a ? left : half ? wide_b : (float *)b + start;
            add_products(&sum, left, right, start, numel, lengths[tensor]);
            merge(totals + tensor, &sum);
        }
    }
    for (int64_t i = 0; i < tensors; i++) finish(totals + i);
}

/* Updates the state of a block, and sums the squares of its weights and directions. A loop of its own where it stores them:
 * a condition in it would be evaluated for every vector. */
#define SUM_BLOCK(name, buffers, store)                                                                                \
    {                                                                                                                  \
        float weight = 0.0f, update = 0.0f;                                                                            \
        _Pragma("omp simd reduction(+ : weight, update)")                                                              \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            float x = buffers > 0 ? a[i] : 0.0f, y = buffers > 1 ? b[i] : 0.0f, z = buffers > 2 ? c[i] : 0.0f;         \
            const float d = name##_update(h, s, p[i], s[FACTOR] * g[i], &x, &y, &z);                                   \
            if (buffers > 0) a[i] = x;                                                                                 \
            if (buffers > 1) b[i] = y;                                                                                 \
            if (buffers > 2) c[i] = z;                                                                                 \
            weight = fmaf(p[i], p[i], weight);                                                                         \
            update = fmaf(d, d, update);                                                                               \
            store                                                                                                      \
        }                                                                                                              \
        direction[0] = weight;                                                                                         \
        direction[1] = update;                                                                                         \
        return;                                                                                                        \
    }

/* `buffers` is the number of state buffers of the rule. */
#define RULE(name, buffers)                                                                                            \
    static void name##_rows(int mode, const float *hyper, const float *scales, float *restrict p,                      \
                            float *restrict g, float *restrict a, float *restrict b, float *restrict c,                \
                            int64_t n, float *restrict direction) {                                                    \
        float h[HYPER], s[SCALES];                                                                                     \
        for (int i = 0; i < HYPER; i++) h[i] = hyper[i];                                                               \
        for (int i = 0; i < SCALES; i++) s[i] = scales[i];                                                             \
        if (mode == APPLY) {                                                                                           \
            _Pragma("omp simd")                                                                                        \
            for (int64_t i = 0; i < n; i++)                                                                            \
                p[i] = fmaf(-s[RATIO], name##_again(h, s, p[i], s[FACTOR] * g[i], buffers > 0 ? a[i] : 0.0f,           \
                                       buffers > 1 ? b[i] : 0.0f, buffers > 2 ? c[i] : 0.0f), p[i]);                   \
            return;                                                                                                    \
        }                                                                                                              \
        if (mode == APPLY_KEPT) {                                                                                      \
            _Pragma("omp simd")                                                                                        \
            for (int64_t i = 0; i < n; i++) p[i] = fmaf(-s[RATIO], g[i], p[i]);                                        \
            return;                                                                                                    \
        }                                                                                                              \
        if (mode == STEP) {                                                                                            \
            _Pragma("omp simd")                                                                                        \
            for (int64_t i = 0; i < n; i++) {                                                                          \
                float x = buffers > 0 ? a[i] : 0.0f, y = buffers > 1 ? b[i] : 0.0f, z = buffers > 2 ? c[i] : 0.0f;     \
                p[i] = fmaf(-s[RATIO], name##_update(h, s, p[i], s[FACTOR] * g[i], &x, &y, &z), p[i]);                 \
                if (buffers > 0) a[i] = x;                                                                             \
                if (buffers > 1) b[i] = y;                                                                             \
                if (buffers > 2) c[i] = z;                                                                             \
            }                                                                                                          \
            return;                                                                                                    \
        }                                                                                                              \
        if (mode == SUM) SUM_BLOCK(name, buffers, )                                                                    \
        if (mode == SUM_KEEP) SUM_BLOCK(name, buffers, g[i] = d;)                                                      \
        _Pragma("omp simd")                                                                                            \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            float x = buffers > 0 ? a[i] : 0.0f, y = buffers > 1 ? b[i] : 0.0f, z = buffers > 2 ? c[i] : 0.0f;         \
            direction[i] = name##_update(h, s, p[i], s[FACTOR] * g[i], &x, &y, &z);                                    \
            if (buffers > 0) a[i] = x;                                                                                 \
            if (buffers > 1) b[i] = y;                                                                                 \
            if (buffers > 2) c[i] = z;                                                                                 \
        }                                                                                                              \
    }                                                                                                                  \
    void name(const int64_t *table, const float *scales, Total *totals, int64_t tensors, const float *hyper, int flags,\
              int mode, int threads) {                                                                                 \
        walk(name##_rows, table, scales, totals, tensors, hyper, flags, mode, threads);                                 \
    }

RULE(sgd, 0)
RULE(momentum, 1)
RULE(nesterov, 1)
RULE(adam, 2)
RULE(adagrad, 1)
RULE(rmsprop, 1)
RULE(rmsprop_centered, 2)
RULE(rmsprop_momentum, 2)
RULE(rmsprop_centered_momentum, 3)
