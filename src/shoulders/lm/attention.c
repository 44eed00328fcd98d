/* Attention of packed rows, forwards and backwards. Compiled behind kernels.c, whose types and
 * functions it uses.
 */
#define LANES 16
#define WIDE 32 /* two vectors: their sums do not wait for each other */

/* May lie anywhere and be any other pointer's floats; compilers split it where it is too wide. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

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
