/* What stands between the integer products of a Llama-style layer: norms, gates, rounding.
 *
 * Every function walks rows one after the other and reads and writes each value once or twice, so
 * that a row stays in the nearest cache. A row's result depends on that row alone. Rounding is
 * symmetric: levels = x / scale, scale = largest magnitude of the row / 127. The largest magnitude
 * is found on the bit patterns, whose order is that of the magnitudes: a row with a NaN or an
 * infinity gets such a scale, and its results say so, whatever the compiler assumes of floats.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define SMALLEST 1e-30f

typedef int64_t size;

static float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* The place of a float among all floats, NaN above infinity, and the float at a place. */
static inline int32_t order_of(float x) {
    int32_t bits = (int32_t)bits_of(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline float of_order(int32_t place) {
    return of_bits((uint32_t)(place ^ ((place >> 31) & 0x7fffffff)));
}

/* The upper half of a float: bfloat16. */
typedef uint16_t half_t;

static inline half_t to_half(float x) {
    uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0; /* rounding could carry a NaN away */
    return (half_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float of_half(half_t x) { return of_bits((uint32_t)x << 16); }

/* Round one row to levels; returns its scale. */
static float rounded(const float *x, int8_t *levels, size n) {
    uint32_t largest = 0;
    for (size i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    float scale = of_bits(largest) / 127.0f;
    if (scale < SMALLEST) scale = SMALLEST;
    float inverse = 1.0f / scale;
    for (size i = 0; i < n; i++) levels[i] = (int8_t)(int32_t)rintf(x[i] * inverse);
    return scale;
}

/* e^x for |x| below 87 and clamped beyond, to about 2e-7 relative: 2^n times a polynomial. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f
              + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    return p * of_bits((uint32_t)((int32_t)n + 127) << 23);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

static float inverse_rms(const float *x, size n, float epsilon) {
    float sum = 0.0f;
    for (size i = 0; i < n; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / (float)n + epsilon);
}

/* levels, scale <- x [m, n], each value first multiplied by its channel (or not: NULL). */
void round_rows(const float *x, const float *channel, int8_t *levels, float *scale, float *row,
                size m, size n) {
    for (size j = 0; j < m; j++) {
        const float *from = x + j * n;
        if (channel) {
            for (size i = 0; i < n; i++) row[i] = from[i] * channel[i];
            from = row;
        }
        scale[j] = rounded(from, levels + j * n, n);
    }
}

/* levels, scale <- RMS norm of x [m, n] with weight [n]. */
void norm_round(const float *x, const float *weight, float epsilon, int8_t *levels, float *scale,
                float *row, size m, size n) {
    for (size j = 0; j < m; j++) {
        const float *from = x + j * n;
        float inverse = inverse_rms(from, n, epsilon);
        for (size i = 0; i < n; i++) row[i] = weight[i] * (from[i] * inverse);
        scale[j] = rounded(row, levels + j * n, n);
    }
}

/* y [m, n] <- product * row scale * channel (or 1) + bias (or 0) + rest [m, n] (or 0). */
void rescale(const int32_t *product, const float *scale, const float *channel, const float *bias,
             const float *rest, float *y, size m, size n) {
    for (size j = 0; j < m; j++) {
        const int32_t *from = product + j * n;
        float *to = y + j * n;
        float s = scale[j];
        if (channel) for (size i = 0; i < n; i++) to[i] = (float)from[i] * s * channel[i];
        else for (size i = 0; i < n; i++) to[i] = (float)from[i] * s;
        if (bias) for (size i = 0; i < n; i++) to[i] += bias[i];
        if (rest) for (size i = 0; i < n; i++) to[i] += rest[j * n + i];
    }
}

/* Value i of floats, or of halves. Written for a constant `half`. */
#define INLINE static inline __attribute__((always_inline))
INLINE float value_of(const void *x, size i, int half) {
    return half ? of_half(((const half_t *)x)[i]) : ((const float *)x)[i];
}

INLINE void gate_rows(const void *gate_up, int half, int8_t *levels, float *scale, float *row,
                      size m, size n) {
    for (size j = 0; j < m; j++) {
        size gate = j * 2 * n, up = gate + n;
        for (size i = 0; i < n; i++) {
            float g = value_of(gate_up, gate + i, half);
            row[i] = g * sigmoid(g) * value_of(gate_up, up + i, half);
        }
        scale[j] = rounded(row, levels + j * n, n);
    }
}

/* levels, scale [m, n] <- silu(gate) * up, from gate_up [m, 2 n], floats or halves. */
void gate_round(const void *gate_up, int64_t half, int8_t *levels, float *scale, float *row, size m,
                size n) {
    if (half) gate_rows(gate_up, 1, levels, scale, row, m, n);
    else gate_rows(gate_up, 0, levels, scale, row, m, n);
}

INLINE void gate_back_rows(const int32_t *product, const float *product_scale, const float *added,
                           const void *gate_up, int half, const float *channel, float *plain,
                           half_t *plain_half, int8_t *levels, float *scale, float *row, size m,
                           size n) {
    for (size j = 0; j < m; j++) {
        size gates = j * 2 * n, ups = gates + n;
        const int32_t *from = product + j * n;
        float s = product_scale[j];
        for (size i = 0; i < n; i++) row[i] = (float)from[i] * s;
        if (added) for (size i = 0; i < n; i++) row[i] += added[j * n + i];
        for (size i = 0; i < n; i++) {
            float gate = value_of(gate_up, gates + i, half), up = value_of(gate_up, ups + i, half);
            float g = row[i], on = sigmoid(gate);
            row[i] = g * up * on * (1.0f + gate * (1.0f - on));
            row[n + i] = g * gate * on;
        }
        if (plain) memcpy(plain + gates, row, 2 * n * 4);
        if (plain_half) for (size i = 0; i < 2 * n; i++) plain_half[gates + i] = to_half(row[i]);
        for (size i = 0; i < 2 * n; i++) row[i] *= channel[i];
        scale[j] = rounded(row, levels + j * 2 * n, 2 * n);
    }
}

/* levels, scale [m, 2 n] <- gradient of gate_up * channel [2 n], where the gradient of
 * silu(gate) * up is product [m, n] * product_scale [m] + added [m, n] (or NULL). That gradient
 * itself goes to plain or plain_half [m, 2 n] (or NULL). */
void gate_back_round(const int32_t *product, const float *product_scale, const float *added,
                     const void *gate_up, int64_t half, const float *channel, float *plain,
                     half_t *plain_half, int8_t *levels, float *scale, float *row, size m, size n) {
    if (half)
        gate_back_rows(product, product_scale, added, gate_up, 1, channel, plain, plain_half,
                       levels, scale, row, m, n);
    else
        gate_back_rows(product, product_scale, added, gate_up, 0, channel, plain, plain_half,
                       levels, scale, row, m, n);
}

/* y [m, n] <- rest + gradient of x through its RMS norm, where the norm's output has the
 * gradient product [m, n] * product_scale [m] + added [m, n] (or NULL). */
void norm_back(const int32_t *product, const float *product_scale, const float *added,
               const float *x, const float *weight, float epsilon, const float *rest, float *y,
               float *row, size m, size n) {
    for (size j = 0; j < m; j++) {
        const float *from = x + j * n;
        float inverse = inverse_rms(from, n, epsilon), s = product_scale[j], sum = 0.0f;
        for (size i = 0; i < n; i++) row[i] = (float)product[j * n + i] * s * weight[i];
        if (added) for (size i = 0; i < n; i++) row[i] += added[j * n + i] * weight[i];
        for (size i = 0; i < n; i++) sum += row[i] * from[i];
        float mean = sum * inverse * inverse / (float)n;
        for (size i = 0; i < n; i++)
            y[j * n + i] = rest[j * n + i] + inverse * (row[i] - from[i] * mean);
    }
}

/* Turn the first `heads` heads of qkv [t, all heads, e] by the angles of cos, sin [t, e / 2];
 * with sign -1 turn them back. In place. */
void rotate(float *qkv, const float *cosine, const float *sine, float sign, size t, size heads,
            size all, size e) {
    size half = e / 2;
    for (size i = 0; i < t; i++) {
        const float *c = cosine + i * half, *s = sine + i * half;
        for (size h = 0; h < heads; h++) {
            float *first = qkv + (i * all + h) * e, *second = first + half;
            for (size d = 0; d < half; d++) {
                float a = first[d], b = second[d], turn = sign * s[d];
                first[d] = a * c[d] - b * turn;
                second[d] = b * c[d] + a * turn;
            }
        }
    }
}

#define STRETCH 512

/* index [m] <- where the first of the greatest of x [m, n] is; sum [m] <- log sum of e^x. */
void likeliest(const float *x, int64_t *index, float *sum, size m, size n) {
    for (size j = 0; j < m; j++, x += n) {
        int32_t most = INT32_MIN;
        size at = 0;
        for (size from = 0; from < n; from += STRETCH) {
            size end = from + STRETCH < n ? from + STRETCH : n;
            int32_t own = INT32_MIN;
            for (size i = from; i < end; i++) own = order_of(x[i]) > own ? order_of(x[i]) : own;
            if (own > most) most = own, at = from;
        }
        while (order_of(x[at]) != most) at++;
        float total = 0.0f, largest = of_order(most);
        for (size i = 0; i < n; i++) total += exponential(x[i] - largest);
        index[j] = at;
        sum[j] = largest + logf(total);
    }
}
