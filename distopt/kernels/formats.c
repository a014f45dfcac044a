/* The forms in which weights and state are stored, and their conversion from and to float32, in which rules compute.
 *
 * The same bits as distopt/kernels/rounding.py.
 */
#include <stdint.h>
#include <string.h>

enum { CHUNK = 1024, STORES = 4 }; /* elements that are converted at once; weights and state buffers */
enum { FLOAT32, BFLOAT16, REMAINDER }; /* rounded at random; with the lower halves of the bits in `extra` */

typedef struct { char *data, *extra; int64_t format; uint32_t key; } Store;
typedef struct { int64_t start, width, stride; } Window; /* distopt/kernels/window.py */

static inline uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

/* Writes the random bits of n elements of a shard. */
static void fill_noise(uint32_t key, Window window, int64_t from, int64_t n, uint32_t *restrict to) {
    for (int64_t i = 0; i < n;) {
        const int64_t column = (from + i) % window.width;
        const int64_t place = window.start + (from + i) / window.width * window.stride + column;
        int64_t run = ((int64_t)1 << 32) - (int64_t)(uint32_t)place; /* the upper half of the place is the same */
        if (run > window.width - column) run = window.width - column;
        if (run > n - i) run = n - i;
        const uint32_t high = mix((uint32_t)(place >> 32) ^ key), low = (uint32_t)place;
        for (int64_t k = 0; k < run; k++) to[i + k] = mix((low + (uint32_t)k) ^ high);
        i += run;
    }
}

/* Returns the bits of a number, those of one nan for all. */
static inline uint32_t canonical(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : bits;
}

static void widen(const uint16_t *restrict from, float *restrict to, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, sizeof bits);
    }
}

static void join(const uint16_t *restrict weights, const uint16_t *restrict remainders, float *restrict to, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t high = weights[i], low = remainders[i], carry = low >> 15;
        const uint32_t bits = carry && !(high & 0x7FFFu) ? high << 16 : (high - carry) << 16 | low;
        memcpy(to + i, &bits, sizeof bits);
    }
}

/* Reads n elements from `from` on into `to`. */
static void load(const Store *store, int64_t from, int64_t n, float *restrict to) {
    const uint16_t *data = (uint16_t *)store->data + from, *extra = (uint16_t *)store->extra + from;
    if (store->format == FLOAT32) memcpy(to, (float *)store->data + from, n * sizeof *to);
    if (store->format == BFLOAT16) widen(data, to, n);
    if (store->format == REMAINDER) join(data, extra, to, n);
}

/* Writes n elements, at most CHUNK, from `from` on. */
static void save(const Store *store, Window window, int64_t from, int64_t n, const float *restrict values) {
    uint16_t *restrict data = (uint16_t *)store->data + from, *restrict extra = (uint16_t *)store->extra + from;
    uint32_t noise[CHUNK];
    if (store->format == BFLOAT16) {
        fill_noise(store->key, window, from, n, noise);
        for (int64_t i = 0; i < n; i++) data[i] = (canonical(values[i]) + (noise[i] >> 16)) >> 16;
    }
    if (store->format == REMAINDER)
        for (int64_t i = 0; i < n; i++) {
            const uint32_t bits = canonical(values[i]);
            data[i] = (bits + 0x8000u) >> 16;
            extra[i] = bits;
        }
}
