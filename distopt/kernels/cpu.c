/* The rules of distopt/optim on float32 tensors of the CPU, each number read and written as seldom as can be.
 *
 * A call walks over many tensors in pieces that the threads share. `table` and `scales` hold one column after the other,
 * with a number for each tensor. The columns of `table`: lengths, then the addresses of weights, gradients (`half`: of
 * bfloat16, the upper half of a float32) and up to three state buffers. Those of `scales`: what differs between
 * tensors, the last of them what the direction is multiplied by. `mode`:
 *   STEP     moves state and weights;
 *   MEASURE  moves the state, and adds up the squares of each tensor's weights and of its direction;
 *   APPLY    makes the same direction again, from the state, and moves the weights.
 * So a layer whose direction has to be known whole before it may move (LAMB) needs no memory for it.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { STEP, MEASURE, APPLY };
enum { PIECE = 8192, WAVE = 2048, ROW = 512, HYPER = 6, SCALES = 3 };

typedef struct { int64_t tensor, start, numel; } Piece;
typedef void Rows(int mode, const float *hyper, const float *scales, float *restrict p, const float *restrict g,
                  float *restrict a, float *restrict b, float *restrict c, int64_t n, double *sums);

/* sgd: h = decay, momentum, nesterov; s = share of the gradient in the momentum, rate of the gradient */
static inline float sgd_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    return h[2] != 0.0f ? s[1] * (g + h[0] * p) + h[1] * a : a;
}
static inline float sgd_update(const float *h, const float *s, float p, float g, float *a, float *b, float *c) {
    g = s[1] * (g + h[0] * p);
    *a = h[1] * *a + s[0] * g;
    return h[2] != 0.0f ? g + h[1] * *a : *a;
}

/* plain: h = decay; s = -, rate of the gradient */
static inline float plain_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    return s[1] * (g + h[0] * p);
}
static inline float plain_update(const float *h, const float *s, float p, float g, float *a, float *b, float *c) {
    return plain_again(h, s, p, g, 0.0f, 0.0f, 0.0f);
}

/* adam: h = decay in the gradient, beta1, beta2, eps, decay of the weights; s = 1 / bias1, 1 / sqrt(bias2) */
static inline float adam_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    return a * s[0] / (sqrtf(b) * s[1] + h[3]) + h[4] * p;
}
static inline float adam_update(const float *h, const float *s, float p, float g, float *a, float *b, float *c) {
    g += h[0] * p;
    *a += (1.0f - h[1]) * (g - *a);
    *b = h[2] * *b + (1.0f - h[2]) * g * g;
    return adam_again(h, s, p, g, *a, *b, 0.0f);
}

/* adagrad: h = decay, eps; s = 1 / (1 + (step - 1) lr_decay) */
static inline float adagrad_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    return (g + h[0] * p) * s[0] / (sqrtf(a) + h[1]);
}
static inline float adagrad_update(const float *h, const float *s, float p, float g, float *a, float *b, float *c) {
    float decayed = g + h[0] * p;
    *a += decayed * decayed;
    return adagrad_again(h, s, p, g, *a, 0.0f, 0.0f);
}

/* rmsprop: h = decay, alpha, eps, momentum. Its buffers, as far as they are there: squares, means, momentum. */
static inline float rmsprop_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    return (g + h[0] * p) / (sqrtf(a) + h[2]);
}
static inline float rmsprop_update(const float *h, const float *s, float p, float g, float *a, float *b, float *c) {
    float decayed = g + h[0] * p;
    *a = h[1] * *a + (1.0f - h[1]) * decayed * decayed;
    return decayed / (sqrtf(*a) + h[2]);
}
static inline float rmsprop_centered_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    const float variance = a - b * b; /* of a constant gradient rounded below 0 */
    return (g + h[0] * p) / (sqrtf(variance < 0.0f ? 0.0f : variance) + h[2]);
}
static inline float rmsprop_centered_update(const float *h, const float *s, float p, float g, float *a, float *b,
                                            float *c) {
    float decayed = g + h[0] * p;
    *a = h[1] * *a + (1.0f - h[1]) * decayed * decayed;
    *b += (1.0f - h[1]) * (decayed - *b);
    return rmsprop_centered_again(h, s, p, g, *a, *b, 0.0f);
}
static inline float rmsprop_momentum_again(const float *h, const float *s, float p, float g, float a, float b, float c) {
    return b;
}
static inline float rmsprop_momentum_update(const float *h, const float *s, float p, float g, float *a, float *b,
                                            float *c) {
    return *b = h[3] * *b + rmsprop_update(h, s, p, g, a, 0, 0);
}
static inline float rmsprop_centered_momentum_again(const float *h, const float *s, float p, float g, float a, float b,
                                                    float c) {
    return c;
}
static inline float rmsprop_centered_momentum_update(const float *h, const float *s, float p, float g, float *a,
                                                     float *b, float *c) {
    return *c = h[3] * *c + rmsprop_centered_update(h, s, p, g, a, b, 0);
}

/* At most WAVE of the pieces that come next, from where `at` stands; moves `at` behind them. */
static int64_t cut(const int64_t *numel, int64_t tensors, Piece *at, Piece *pieces) {
    int64_t count = 0;
    while (at->tensor < tensors && count < WAVE) {
        const int64_t left = numel[at->tensor] - at->start;
        if (left > 0) pieces[count++] = (Piece){at->tensor, at->start, left < PIECE ? left : PIECE};
        if (left > PIECE)
            at->start += PIECE;
        else
            *at = (Piece){at->tensor + 1, 0, 0};
    }
    return count;
}

static void widen(const uint16_t *from, float *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, sizeof bits);
    }
}

/* Does `rows` on every row of every piece. Sums are taken in the same order whatever the number of threads. */
static void walk(Rows *rows, const int64_t *table, const float *scales, double *squares, int64_t tensors,
                 const float *hyper, int half, int mode, int threads) {
    Piece pieces[WAVE];
    double sums[WAVE][2];
    Piece at = {0, 0, 0};
    for (int64_t count; (count = cut(table, tensors, &at, pieces));) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 1)
        for (int64_t k = 0; k < count; k++) {
            const int64_t tensor = pieces[k].tensor, end = pieces[k].start + pieces[k].numel;
            char *column[5] = {0};
            for (int i = 0; i < 5; i++) column[i] = (char *)table[(i + 1) * tensors + tensor];
            float s[SCALES], widened[ROW];
            for (int i = 0; i < SCALES; i++) s[i] = scales[i * tensors + tensor];
            sums[k][0] = sums[k][1] = 0.0;
            for (int64_t from = pieces[k].start; from < end; from += ROW) {
                const int64_t n = end - from < ROW ? end - from : ROW;
                if (half) widen((uint16_t *)column[1] + from, widened, n);
                rows(mode, hyper, s, (float *)column[0] + from, half ? widened : (float *)column[1] + from,
                     (float *)column[2] + from, (float *)column[3] + from, (float *)column[4] + from, n, sums[k]);
            }
        }
        for (int64_t k = 0; mode == MEASURE && k < count; k++) {
            squares[2 * pieces[k].tensor] += sums[k][0];
            squares[2 * pieces[k].tensor + 1] += sums[k][1];
        }
    }
}

/* `buffers` is how many state buffers the rule has. */
#define RULE(name, buffers)                                                                                            \
    static void name##_rows(int mode, const float *hyper, const float *scales, float *restrict p,                      \
                            const float *restrict g, float *restrict a, float *restrict b, float *restrict c,          \
                            int64_t n, double *sums) {                                                                 \
        float h[HYPER], s[SCALES], weight = 0.0f, update = 0.0f;                                                       \
        for (int i = 0; i < HYPER; i++) h[i] = hyper[i];                                                               \
        for (int i = 0; i < SCALES; i++) s[i] = scales[i];                                                             \
        if (mode == APPLY) {                                                                                           \
            _Pragma("omp simd")                                                                                        \
            for (int64_t i = 0; i < n; i++)                                                                            \
                p[i] -= s[2] * name##_again(h, s, p[i], g[i], buffers > 0 ? a[i] : 0.0f, buffers > 1 ? b[i] : 0.0f,    \
                                            buffers > 2 ? c[i] : 0.0f);                                                \
            return;                                                                                                    \
        }                                                                                                              \
        if (mode == STEP) {                                                                                            \
            _Pragma("omp simd")                                                                                        \
            for (int64_t i = 0; i < n; i++) {                                                                          \
                float x = buffers > 0 ? a[i] : 0.0f, y = buffers > 1 ? b[i] : 0.0f, z = buffers > 2 ? c[i] : 0.0f;     \
                p[i] -= s[2] * name##_update(h, s, p[i], g[i], &x, &y, &z);                                            \
                if (buffers > 0) a[i] = x;                                                                             \
                if (buffers > 1) b[i] = y;                                                                             \
                if (buffers > 2) c[i] = z;                                                                             \
            }                                                                                                          \
            return;                                                                                                    \
        }                                                                                                              \
        _Pragma("omp simd reduction(+ : weight, update)")                                                              \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            float x = buffers > 0 ? a[i] : 0.0f, y = buffers > 1 ? b[i] : 0.0f, z = buffers > 2 ? c[i] : 0.0f;         \
            const float d = name##_update(h, s, p[i], g[i], &x, &y, &z);                                               \
            if (buffers > 0) a[i] = x;                                                                                 \
            if (buffers > 1) b[i] = y;                                                                                 \
            if (buffers > 2) c[i] = z;                                                                                 \
            weight += p[i] * p[i];                                                                                     \
            update += d * d;                                                                                           \
        }                                                                                                              \
        sums[0] += weight;                                                                                             \
        sums[1] += update;                                                                                             \
    }                                                                                                                  \
    void name(const int64_t *table, const float *scales, double *squares, int64_t tensors, const float *hyper,         \
              int half, int mode, int threads) {                                                                       \
        walk(name##_rows, table, scales, squares, tensors, hyper, half, mode, threads);                                \
    }

RULE(plain, 0)
RULE(sgd, 1)
RULE(adam, 2)
RULE(adagrad, 1)
RULE(rmsprop, 1)
RULE(rmsprop_centered, 2)
RULE(rmsprop_momentum, 2)
RULE(rmsprop_centered_momentum, 3)
