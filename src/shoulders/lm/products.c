/* Products of a few queries with the keys or values of one head, and softmax. Compiled behind
 * kernels.c, whose types and functions it uses.
 */
#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8 /* compilers split what is wider than the processor's registers badly */
#endif
#define WIDE (2 * LANES) /* two vectors: their sums do not wait for each other */
#define LINE 16          /* floats that are fetched at once */

/* May lie anywhere and be any other pointer's floats. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* The three products below take `count` queries of one key/value head at once: what is read of
 * keys or values serves all of them, and their sums do not wait for each other. Each is written for
 * a constant count, so that its sums stay in registers: twelve of AVX2's sixteen. */
#define MOST 4
#define QUERIES 6

/* y[c, 0..m) <- factor * (x[c, e] . turned [e, n]), and something in y up to a multiple of WIDE:
 * whole vectors always, since n is such a multiple. */
INLINE void dots_of(const float *restrict x, const float *restrict turned, float factor,
                    float *restrict y, size m, size n, size e, int count) {
    for (size j = 0; j < m; j += WIDE) {
        vector first[QUERIES] = {{0}}, second[QUERIES] = {{0}};
        const float *at = turned + j;
        for (size d = 0; d < e; d++, at += n) {
            vector one = *(const vector *)at, two = *(const vector *)(at + LANES);
            for (int c = 0; c < count; c++) {
                first[c] += x[c * e + d] * one;
                second[c] += x[c * e + d] * two;
            }
        }
        for (int c = 0; c < count; c++) {
            *(vector *)(y + c * n + j) = factor * first[c];
            *(vector *)(y + c * n + j + LANES) = factor * second[c];
        }
    }
}

/* y [c, e] <- p [c, m] . plain [m, e]; rows of p are n apart, those of plain `apart`. */
INLINE void weighted_of(const float *restrict p, const float *restrict plain, float *restrict y,
                        size m, size n, size e, size apart, int count) {
    size d = 0;
    for (; d + WIDE <= e; d += WIDE) {
        vector first[QUERIES] = {{0}}, second[QUERIES] = {{0}};
        const float *at = plain + d;
        for (size j = 0; j < m; j++, at += apart) {
            vector one = *(const vector *)at, two = *(const vector *)(at + LANES);
            for (int c = 0; c < count; c++) {
                first[c] += p[c * n + j] * one;
                second[c] += p[c * n + j] * two;
            }
        }
        for (int c = 0; c < count; c++) {
            *(vector *)(y + c * e + d) = first[c];
            *(vector *)(y + c * e + d + LANES) = second[c];
        }
    }
    for (; d < e; d++)
        for (int c = 0; c < count; c++) {
            float sum = 0.0f;
            for (size j = 0; j < m; j++) sum += p[c * n + j] * plain[j * apart + d];
            y[c * e + d] = sum;
        }
}

/* plain [m, e] += p [c, m] times x [c, e], summed over c; rows of p are n apart. */
INLINE void spread_of(const float *restrict p, const float *restrict x, float *restrict plain,
                      size m, size n, size e, int count) {
    size d = 0;
    for (; d + WIDE <= e; d += WIDE) {
        vector first[QUERIES], second[QUERIES];
        for (int c = 0; c < count; c++) {
            first[c] = *(const vector *)(x + c * e + d);
            second[c] = *(const vector *)(x + c * e + d + LANES);
        }
        float *at = plain + d;
        for (size j = 0; j < m; j++, at += e) {
            vector one = *(vector *)at, two = *(vector *)(at + LANES);
            for (int c = 0; c < count; c++) {
                one += p[c * n + j] * first[c];
                two += p[c * n + j] * second[c];
            }
            *(vector *)at = one;
            *(vector *)(at + LANES) = two;
        }
    }
    for (; d < e; d++)
        for (size j = 0; j < m; j++)
            for (int c = 0; c < count; c++) plain[j * e + d] += p[c * n + j] * x[c * e + d];
}

/* Do CALL(c, k) for all of `count` queries, k of them at once from query c on. */
#define AT_ONCE(CALL)                                                                             \
    for (size c = 0; c < count;) switch (count - c) {                                             \
        case 1: CALL(c, 1); c += 1; break;                                                        \
        case 2: CALL(c, 2); c += 2; break;                                                        \
        case 3: CALL(c, 3); c += 3; break;                                                        \
        case 4: case 5: CALL(c, 4); c += 4; break;                                                \
        default: CALL(c, 6); c += 6;                                                              \
        }

static void dots(const float *x, const float *turned, float factor, float *y, size m, size n,
                 size e, size count) {
#define DOTS(c, k) dots_of(x + c * e, turned, factor, y + c * n, m, n, e, k)
    AT_ONCE(DOTS)
}

static void weighted(const float *p, const float *plain, float *y, size m, size n, size e,
                     size apart, size count) {
#define WEIGHTED(c, k) weighted_of(p + c * n, plain, y + c * e, m, n, e, apart, k)
    AT_ONCE(WEIGHTED)
}

static void spread(const float *p, const float *x, float *plain, size m, size n, size e,
                   size count) {
#define SPREAD(c, k) spread_of(p + c * n, x + c * e, plain, m, n, e, k)
    AT_ONCE(SPREAD)
}

static void softmax(float *y, size m) {
    int32_t most = INT32_MIN; /* of integers compilers take the largest sixteen at once */
    for (size j = 0; j < m; j++) most = order_of(y[j]) > most ? order_of(y[j]) : most;
    float largest = of_order(most), sum = 0.0f;
    for (size j = 0; j < m; j++) {
        y[j] = exponential(y[j] - largest) + (y[j] - y[j]); /* the last term keeps NaN a NaN */
        sum += y[j];
    }
    float inverse = 1.0f / sum;
    for (size j = 0; j < m; j++) y[j] *= inverse;
}

/* The sum of a vector, half by half. */
typedef float vector8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vector4 __attribute__((vector_size(16), aligned(4), may_alias));

INLINE float sum_of(vector x) {
    vector8 eight[LANES / 8];
    memcpy(eight, &x, sizeof eight);
    if (LANES > 8) eight[0] += eight[LANES / 8 - 1];
    vector4 four[2];
    memcpy(four, eight, sizeof four);
    four[0] += four[1];
    return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

/* p [count, n] <- factor * (x [count, e] . m keys), which lie `apart` floats from each other. Of
 * what will be read next, as many pieces of as many floats are fetched meanwhile. */
INLINE void dots_where_they_lie(const float *restrict x, const float *restrict keys, float factor,
                                float *restrict p, size m, size n, size e, size apart,
                                const float *next_keys, const float *next_values, int count) {
    for (size j = 0; j < m; j++, keys += apart) {
        if (next_keys)
            for (size d = 0; d < e; d += LINE) {
                __builtin_prefetch(next_keys + j * apart + d, 0, 2);
                __builtin_prefetch(next_values + j * apart + d, 0, 2);
            }
        vector sums[QUERIES] = {{0}};
        size d = 0;
        for (; d + LANES <= e; d += LANES) {
            vector key = *(const vector *)(keys + d);
            for (int c = 0; c < count; c++) sums[c] += key * *(const vector *)(x + c * e + d);
        }
        for (int c = 0; c < count; c++) {
            float sum = sum_of(sums[c]);
            for (size i = d; i < e; i++) sum += x[c * e + i] * keys[i];
            p[c * n + j] = factor * sum;
        }
    }
}
