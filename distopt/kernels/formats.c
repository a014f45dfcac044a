/* The forms in which weights and state are stored, and their conversion from and to float32, in which rules compute.
 *
 * The same bits as distopt/kernels/rounding.py and distopt/kernels/blocks.py.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { CHUNK = 1024, STORES = 4 }; /* elements that are converted at once; weights and state buffers */
/* BFLOAT16 is rounded at random; REMAINDER has the lower halves of the bits in `extra`; the others are codes in blocks,
 * with the scales in `extra`. */
enum { FLOAT32, BFLOAT16, REMAINDER, SIGNED8, SQUARES8, SIGNED4, SQUARES4 };

typedef struct { char *data, *extra; int64_t format; uint32_t key; } Store;
typedef struct { int64_t start, width, stride, first; } Window; /* distopt/kernels/window.py */

static inline uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

/* Writes the random bits of n elements of a shard. */
static void fill_noise(uint32_t key, Window window, int64_t from, int64_t n, uint32_t *restrict to) {
    for (int64_t i = 0; i < n;) {
        const int64_t at = window.first + from + i, column = at % window.width;
        const int64_t place = window.start + at / window.width * window.stride + column;
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

/* Returns the elements of a block of a row: the largest that divides it. */
static inline int64_t block_length(int64_t row) { return row % 128 == 0 ? 128 : row % 64 == 0 ? 64 : 32; }

/* The number that a code of 8 bits stands for, or one of 4 bits that is shifted into the upper half. */
static inline float sign_squared(int8_t code, int shift) {
    const int number = code >> shift;
    return (float)(number * (number < 0 ? -number : number));
}

static inline float squared(int code) { return (float)((code + 1) * (code + 1)); }
static inline float fourth(int code) { return (float)((code + 1) * (code + 1) * (code + 1) * (code + 1)); }

/* Reads the codes of one block of n elements. */
static void load_block(int format, const uint8_t *restrict codes, float scale, float *restrict to, int64_t n) {
    const float unit = scale / (format == SIGNED8 ? 16129.0f : format == SIGNED4 ? 49.0f : 65536.0f);
    if (format == SIGNED8)
        for (int64_t i = 0; i < n; i++) to[i] = sign_squared((int8_t)codes[i], 0) * unit;
    if (format == SQUARES8)
        for (int64_t i = 0; i < n; i++) to[i] = squared(codes[i]) * unit;
    if (format == SIGNED4)
        for (int64_t i = 0; i < n / 2; i++) {
            to[2 * i] = sign_squared((int8_t)(uint8_t)(codes[i] << 4), 4) * unit;
            to[2 * i + 1] = sign_squared((int8_t)codes[i], 4) * unit;
        }
    if (format == SQUARES4)
        for (int64_t i = 0; i < n / 2; i++) {
            to[2 * i] = fourth(codes[i] & 15) * unit;
            to[2 * i + 1] = fourth(codes[i] >> 4) * unit;
        }
}

/* Returns the largest magnitude, nan if one is; 0 below the smallest normal number, whose reciprocal is the last finite. */
static float largest(const float *values, int64_t n) {
    int32_t most = 0, bits;
    for (int64_t i = 0; i < n; i++) { /* the order of floats >= 0 is that of their bits, and integers have no nan */
        memcpy(&bits, values + i, sizeof bits);
        bits &= 0x7FFFFFFF;
        most = bits > most ? bits : most;
    }
    most = most > 0x7F800000 ? 0x7FC00000 : most < 0x00800000 ? 0 : most;
    float found;
    memcpy(&found, &most, sizeof found);
    return found;
}

/* Returns the number k whose square, or fourth power, stands for a magnitude: the one below, or at random the next. */
static inline int pick(float magnitude, int top, int power, uint32_t noise) {
    const float root = power == 2 ? sqrtf(magnitude) : sqrtf(sqrtf(magnitude));
    const int below = (int)(root < (float)top ? root : (float)top);
    const int square = below * below;
    const int low = power == 2 ? square : square * square;
    const int gap = power == 2 ? 2 * below + 1 : ((4 * below + 6) * below + 4) * below + 1;
    const float share = (float)(int)(noise >> 8) * 0x1p-24f;
    const int found = below + (share * (float)gap < magnitude - (float)low);
    return found > top ? top : found;
}

static inline int signed_code(float value, float inverse, int top, uint32_t noise) {
    const int number = pick(fabsf(value) * inverse * (float)(top * top), top, 2, noise);
    return value < 0.0f ? -number : number;
}

static inline int squares_code(float value, float inverse, int top, int power, uint32_t noise) {
    const int number = pick(fabsf(value) * inverse * 65536.0f, top, power, noise);
    return (number > 1 ? number : 1) - 1;
}

/* Writes the codes of one block of n elements. */
static void save_block(int format, uint8_t *restrict codes, float *restrict scale, const float *restrict values,
                       const uint32_t *restrict noise, int64_t n) {
    const float most = largest(values, n);
    const float inverse = most > 0.0f && most < INFINITY ? 1.0f / most : 0.0f;
    *scale = most;
    if (format == SIGNED8)
        for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)signed_code(values[i], inverse, 127, noise[i]);
    if (format == SQUARES8)
        for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)squares_code(values[i], inverse, 256, 2, noise[i]);
    uint8_t wide[128];
    if (format == SIGNED4)
        for (int64_t i = 0; i < n; i++) wide[i] = signed_code(values[i], inverse, 7, noise[i]) & 15;
    if (format == SQUARES4)
        for (int64_t i = 0; i < n; i++) wide[i] = squares_code(values[i], inverse, 16, 4, noise[i]);
    if (format >= SIGNED4)
        for (int64_t i = 0; i < n / 2; i++) codes[i] = wide[2 * i] | wide[2 * i + 1] << 4;
}

/* Reads n elements from `from` on, whole blocks of rows of length `row`, into `to`. */
static void load_blocks(const Store *store, int64_t from, int64_t n, int64_t row, float *restrict to) {
    const int64_t length = block_length(row), packed = store->format >= SIGNED4 ? 2 : 1;
    const float *scales = (float *)store->extra + from / length;
    const uint8_t *codes = (uint8_t *)store->data + from / packed;
    for (int64_t i = 0; i < n; i += length)
        load_block((int)store->format, codes + i / packed, scales[i / length], to + i, length);
}

/* Writes n elements, at most CHUNK. */
static void save_blocks(const Store *store, Window window, int64_t from, int64_t n, int64_t row, const float *values) {
    const int64_t length = block_length(row), packed = store->format >= SIGNED4 ? 2 : 1;
    float *scales = (float *)store->extra + from / length;
    uint8_t *codes = (uint8_t *)store->data + from / packed;
    uint32_t noise[CHUNK];
    fill_noise(store->key, window, from, n, noise);
    for (int64_t i = 0; i < n; i += length)
        save_block((int)store->format, codes + i / packed, scales + i / length, values + i, noise + i, length);
}

/* Reads n elements from `from` on into `to`. row: the elements of a row of the layer. */
static void load(const Store *store, int64_t from, int64_t n, int64_t row, float *restrict to) {
    const uint16_t *data = (uint16_t *)store->data + from, *extra = (uint16_t *)store->extra + from;
    if (store->format == FLOAT32) memcpy(to, (float *)store->data + from, n * sizeof *to);
    if (store->format == BFLOAT16) widen(data, to, n);
    if (store->format == REMAINDER) join(data, extra, to, n);
    if (store->format >= SIGNED8) load_blocks(store, from, n, row, to);
}

/* Writes n elements, at most CHUNK, from `from` on. */
static void save(const Store *store, Window window, int64_t from, int64_t n, int64_t row, const float *restrict values) {
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
    if (store->format >= SIGNED8) save_blocks(store, window, from, n, row, values);
}

/* Converts the n elements of a shard to float32 or, if it `saves`, from it: for rules without a kernel. */
void convert(char *data, char *extra, float *values, int64_t start, int64_t width, int64_t stride, int64_t first,
             int64_t format, int64_t n, int64_t row, uint32_t key, int saves, int threads) {
    const Store store = {data, extra, format, key};
    const Window window = {start, width, stride, first};
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 8 * CHUNK)
    for (int64_t from = 0; from < n; from += CHUNK / 2) {
        const int64_t count = n - from < CHUNK / 2 ? n - from : CHUNK / 2;
        if (saves)
            save(&store, window, from, count, row, values + from);
        else
            load(&store, from, count, row, values + from);
    }
}
