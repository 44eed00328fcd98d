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
#define LANES 16
#define WIDE 32 /* two vectors: their sums do not wait for each other */

typedef int64_t size;
/* May lie anywhere and be any other pointer's floats; compilers split it where it is too wide. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

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

/* levels, scale [m, n] <- silu(gate) * up, from gate_up [m, 2 n]. */
void gate_round(const float *gate_up, int8_t *levels, float *scale, float *row, size m, size n) {
    for (size j = 0; j < m; j++) {
        const float *gate = gate_up + j * 2 * n, *up = gate + n;
        for (size i = 0; i < n; i++) row[i] = gate[i] * sigmoid(gate[i]) * up[i];
        scale[j] = rounded(row, levels + j * n, n);
    }
}

/* levels, scale [m, 2 n] <- gradient of gate_up * channel [2 n], where the gradient of
 * silu(gate) * up is product [m, n] * product_scale [m]. */
void gate_back_round(const int32_t *product, const float *product_scale, const float *gate_up,
                     const float *channel, int8_t *levels, float *scale, float *row, size m,
                     size n) {
    for (size j = 0; j < m; j++) {
        const float *gate = gate_up + j * 2 * n, *up = gate + n;
        const int32_t *from = product + j * n;
        float s = product_scale[j];
        for (size i = 0; i < n; i++) {
            float g = (float)from[i] * s, on = sigmoid(gate[i]);
            row[i] = g * up[i] * on * (1.0f + gate[i] * (1.0f - on)) * channel[i];
            row[n + i] = g * gate[i] * on * channel[n + i];
        }
        scale[j] = rounded(row, levels + j * 2 * n, 2 * n);
    }
}

/* y [m, n] <- rest + gradient of x through its RMS norm, where the norm's output has the
 * gradient product [m, n] * product_scale [m]. */
void norm_back(const int32_t *product, const float *product_scale, const float *x,
               const float *weight, float epsilon, const float *rest, float *y, float *row, size m,
               size n) {
    for (size j = 0; j < m; j++) {
        const float *from = x + j * n;
        float inverse = inverse_rms(from, n, epsilon), s = product_scale[j], sum = 0.0f;
        for (size i = 0; i < n; i++) {
            row[i] = (float)product[j * n + i] * s * weight[i];
            sum += row[i] * from[i];
        }
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

/* Attention of packed rows. Row r owns the positions start[r] .. start[r] + length[r] of
 * qkv [t, h + 2 g, e] and sees: its prefix [b, q, g, e], then the `shared` first positions of the
 * pack (unless it is those itself, r = 0), then its own up to the query. */
typedef struct {
    const float *qkv, *prefix_keys, *prefix_values;
    const int64_t *start, *length, *seen, *slot;
    size b, q, shared, h, g, e;
} rows_t;

/* Positions of its prefix that row r sees: all q, or the first ones of a cache. */
static size of_prefix(const rows_t *rows, size r) { return rows->seen ? rows->seen[r] : rows->q; }

static size seen_before(const rows_t *rows, size r) {
    return of_prefix(rows, r) + (rows->shared && r > 0 ? rows->shared : 0);
}

/* Key (or value) j of row r's prefix. */
static const float *in_prefix(const rows_t *rows, const float *prefix, size r, size j, size head) {
    size row = rows->slot ? rows->slot[r] : r;
    return prefix + ((row * rows->q + j) * rows->g + head) * rows->e;
}

static size whole(size n) { return (n + WIDE - 1) / WIDE * WIDE; }

/* Gather what row r sees of key/value head `head`: [n, e] and its transpose [e, n], where n is
 * rounded up to whole vectors and the rest is zero. */
static void gather(const rows_t *rows, size r, size head, size values, float *plain, float *turned) {
    size e = rows->e, all = rows->h + 2 * rows->g, n = 0;
    size at = rows->h + (values ? rows->g : 0) + head;
    const float *prefix = values ? rows->prefix_values : rows->prefix_keys;
    for (size j = 0; j < of_prefix(rows, r); j++)
        memcpy(plain + n++ * e, in_prefix(rows, prefix, r, j, head), e * 4);
    if (rows->shared && r > 0)
        for (size j = 0; j < rows->shared; j++)
            memcpy(plain + n++ * e, rows->qkv + (j * all + at) * e, e * 4);
    for (size j = 0; j < rows->length[r]; j++)
        memcpy(plain + n++ * e, rows->qkv + ((rows->start[r] + j) * all + at) * e, e * 4);
    size full = whole(n);
    memset(plain + n * e, 0, (full - n) * e * 4);
    for (size d = 0; d < e; d++)
        for (size j = 0; j < full; j++) turned[d * full + j] = plain[j * e + d];
}

/* y[0..m) <- factor * (x [e] . turned [e, n]), and something in y up to a multiple of WIDE:
 * whole vectors always, since n is such a multiple. */
static void dots(const float *restrict x, const float *restrict turned, float factor,
                 float *restrict y, size m, size n, size e) {
    for (size j = 0; j < m; j += WIDE) {
        vector first = {0}, second = {0};
        const float *at = turned + j;
        for (size d = 0; d < e; d++, at += n) {
            first += x[d] * *(const vector *)at;
            second += x[d] * *(const vector *)(at + LANES);
        }
        *(vector *)(y + j) = factor * first;
        *(vector *)(y + j + LANES) = factor * second;
    }
}

/* y [e] <- p [m] . plain [m, e] */
static void weighted(const float *restrict p, const float *restrict plain, float *restrict y,
                     size m, size e) {
    size d = 0;
    for (; d + WIDE <= e; d += WIDE) {
        vector first = {0}, second = {0};
        const float *at = plain + d;
        for (size j = 0; j < m; j++, at += e) {
            first += p[j] * *(const vector *)at;
            second += p[j] * *(const vector *)(at + LANES);
        }
        *(vector *)(y + d) = first;
        *(vector *)(y + d + LANES) = second;
    }
    for (; d < e; d++) {
        float sum = 0.0f;
        for (size j = 0; j < m; j++) sum += p[j] * plain[j * e + d];
        y[d] = sum;
    }
}

/* plain [m, e] += p [m] times x [e] */
static void spread(const float *restrict p, const float *restrict x, float *restrict plain,
                   size m, size e) {
    size d = 0;
    for (; d + WIDE <= e; d += WIDE) {
        vector first = *(const vector *)(x + d), second = *(const vector *)(x + d + LANES);
        float *at = plain + d;
        for (size j = 0; j < m; j++, at += e) {
            *(vector *)at += p[j] * first;
            *(vector *)(at + LANES) += p[j] * second;
        }
    }
    for (; d < e; d++)
        for (size j = 0; j < m; j++) plain[j * e + d] += p[j] * x[d];
}

static void softmax(float *y, size m) {
    float largest = y[0], sum = 0.0f;
    for (size j = 1; j < m; j++) largest = y[j] > largest ? y[j] : largest;
    for (size j = 0; j < m; j++) {
        y[j] = exponential(y[j] - largest) + (y[j] - y[j]); /* the last term keeps NaN a NaN */
        sum += y[j];
    }
    float inverse = 1.0f / sum;
    for (size j = 0; j < m; j++) y[j] *= inverse;
}

static float dot(const float *restrict x, const float *restrict y, size e) {
    float sum = 0.0f;
    for (size d = 0; d < e; d++) sum += x[d] * y[d];
    return sum;
}

/* A row of one position reads its prefix where it lies: nothing is gathered for one query. */
static void attend_one(const rows_t *rows, size r, float factor, float *out, float *p) {
    size e = rows->e, all = rows->h + 2 * rows->g, group = rows->h / rows->g;
    size before = of_prefix(rows, r);
    const float *own = rows->qkv + rows->start[r] * all * e;
    for (size head = 0; head < rows->g; head++)
        for (size query = head * group; query < (head + 1) * group; query++) {
            const float *x = own + query * e;
            float *to = out + (rows->start[r] * rows->h + query) * e;
            for (size j = 0; j < before; j++)
                p[j] = factor * dot(x, in_prefix(rows, rows->prefix_keys, r, j, head), e);
            p[before] = factor * dot(x, own + (rows->h + head) * e, e);
            softmax(p, before + 1);
            const float *value = own + (rows->h + rows->g + head) * e;
            for (size d = 0; d < e; d++) to[d] = p[before] * value[d];
            for (size j = 0; j < before; j++)
                spread(p + j, in_prefix(rows, rows->prefix_values, r, j, head), to, 1, e);
        }
}

/* out [t, h, e]; room: n (4 e + 1) floats, n the most that a row sees, in
 * whole vectors. */
void attend(const float *qkv, const float *prefix_keys, const float *prefix_values,
            const int64_t *start, const int64_t *length, const int64_t *seen, const int64_t *slot,
            float *out, float *room, size b, size q, size shared, size h, size g, size e) {
    rows_t rows = {qkv, prefix_keys, prefix_values, start, length, seen, slot,
                   b,   q,           shared,        h,     g,      e};
    size all = h + 2 * g, group = h / g;
    float factor = 1.0f / sqrtf((float)e);
    for (size r = 0; r < b; r++) {
        if (length[r] == 1 && !shared) {
            attend_one(&rows, r, factor, out, room);
            continue;
        }
        size before = seen_before(&rows, r), n = whole(before + length[r]);
        float *k = room, *k_turned = k + n * e, *v = k_turned + n * e, *v_turned = v + n * e;
        float *p = v_turned + n * e;
        for (size head = 0; head < g; head++) {
            gather(&rows, r, head, 0, k, k_turned);
            gather(&rows, r, head, 1, v, v_turned);
            for (size i = 0; i < length[r]; i++)
                for (size own = head * group; own < (head + 1) * group; own++) {
                    size m = before + i + 1;
                    float *to = out + ((start[r] + i) * h + own) * e;
                    dots(qkv + ((start[r] + i) * all + own) * e, k_turned, factor, p, m, n, e);
                    softmax(p, m);
                    weighted(p, v, to, m, e);
                }
        }
    }
}

/* Gradients of qkv [t, h + 2 g, e] and of the prefixes, given that of out [t, h, e]. The
 * probabilities are computed again. room: n (6 e + 2)
 * floats. */
void attend_back(const float *qkv, const float *prefix_keys, const float *prefix_values,
                 const int64_t *start, const int64_t *length, const float *g_out, float *g_qkv,
                 float *g_prefix_keys, float *g_prefix_values, float *room, size b, size q,
                 size shared, size h, size g, size e) {
    rows_t rows = {qkv, prefix_keys, prefix_values, start, length, 0, 0, b, q, shared, h, g, e};
    size all = h + 2 * g, group = h / g;
    float factor = 1.0f / sqrtf((float)e);
    for (size j = 0; j < shared; j++) memset(g_qkv + j * all * e, 0, all * e * 4);
    for (size r = 0; r < b; r++) {
        size before = seen_before(&rows, r), n = whole(before + length[r]);
        float *k = room, *k_turned = k + n * e, *v = k_turned + n * e, *v_turned = v + n * e;
        float *gk = v_turned + n * e, *gv = gk + n * e, *p = gv + n * e, *gp = p + n;
        for (size head = 0; head < g; head++) {
            gather(&rows, r, head, 0, k, k_turned);
            gather(&rows, r, head, 1, v, v_turned);
            memset(gk, 0, 2 * n * e * 4);
            for (size i = 0; i < length[r]; i++)
                for (size own = head * group; own < (head + 1) * group; own++) {
                    size m = before + i + 1;
                    const float *query = qkv + ((start[r] + i) * all + own) * e;
                    const float *go = g_out + ((start[r] + i) * h + own) * e;
                    float *gq = g_qkv + ((start[r] + i) * all + own) * e, mean = 0.0f;
                    dots(query, k_turned, factor, p, m, n, e);
                    softmax(p, m);
                    dots(go, v_turned, 1.0f, gp, m, n, e);
                    for (size j = 0; j < m; j++) mean += p[j] * gp[j];
                    for (size j = 0; j < m; j++) gp[j] = factor * p[j] * (gp[j] - mean);
                    weighted(gp, k, gq, m, e);
                    spread(gp, query, gk, m, e);
                    spread(p, go, gv, m, e);
                }
            for (size values = 0; values < 2; values++) {
                const float *from = values ? gv : gk;
                float *to_prefix = values ? g_prefix_values : g_prefix_keys;
                size at = h + (values ? g : 0) + head;
                for (size j = 0; j < q; j++, from += e)
                    memcpy(to_prefix + ((r * q + j) * g + head) * e, from, e * 4);
                if (before > q)
                    for (size j = 0; j < shared; j++, from += e)
                        for (size d = 0; d < e; d++) g_qkv[(j * all + at) * e + d] += from[d];
                for (size j = 0; j < length[r]; j++, from += e) {
                    float *to = g_qkv + ((start[r] + j) * all + at) * e;
                    if (shared && r == 0) for (size d = 0; d < e; d++) to[d] += from[d];
                    else memcpy(to, from, e * 4);
                }
            }
        }
    }
}
