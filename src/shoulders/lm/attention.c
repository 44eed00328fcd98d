/* Attention of packed rows, forwards and backwards. Compiled behind kernels.c and products.c, whose
 * types and functions it uses.
 */

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

/* Gather what row r sees of key/value head `head`: [n, e] and, unless that is NULL, its transpose
 * [e, n], where n is rounded up to whole vectors and the rest is zero. */
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
    if (!turned) return;
    for (size d = 0; d < e; d++)
        for (size j = 0; j < full; j++) turned[d * full + j] = plain[j * e + d];
}

/* How many positions of a row attend at once: those whose queries of one key/value head fit. */
static size together(size group) { return group < QUERIES ? QUERIES / group : 1; }

/* A row of one position reads its prefix where it lies: nothing is gathered for one query. */
static void attend_one(const rows_t *rows, size r, float factor, float *out, float *p) {
    size e = rows->e, all = rows->h + 2 * rows->g, count = rows->h / rows->g, apart = rows->g * e;
    size before = of_prefix(rows, r), n = before + 1;
    const float *own = rows->qkv + rows->start[r] * all * e;
    for (size head = 0; head < rows->g; head++) {
        const float *x = own + head * count * e, *key = own + (rows->h + head) * e;
        const float *value = key + rows->g * e;
        const float *keys = in_prefix(rows, rows->prefix_keys, r, 0, head);
        const float *values = in_prefix(rows, rows->prefix_values, r, 0, head);
        const float *next_keys = 0, *next_values = 0;
        if (r + 1 < rows->b) {
            next_keys = in_prefix(rows, rows->prefix_keys, r + 1, 0, head);
            next_values = in_prefix(rows, rows->prefix_values, r + 1, 0, head);
        }
        float *to = out + (rows->start[r] * rows->h + head * count) * e;
#define WHERE_THEY_LIE(c, k)                                                                      \
    dots_where_they_lie(x + c * e, keys, factor, p + c * n, before, n, e, apart,                  \
                        c ? 0 : next_keys, next_values, k);                                       \
    dots_where_they_lie(x + c * e, key, factor, p + c * n + before, 1, n, e, apart, 0, 0, k)
        AT_ONCE(WHERE_THEY_LIE)
        for (size c = 0; c < count; c++) softmax(p + c * n, n);
        weighted(p, values, to, before, n, e, apart, count);
        for (size c = 0; c < count; c++)
            for (size d = 0; d < e; d++) to[c * e + d] += p[c * n + before] * value[d];
    }
}

/* Copy what `count` positions have of one head's queries, `wide` floats each, `apart` from each
 * other in what is read. */
static void copied(float *restrict to, const float *restrict from, size count, size wide,
                   size to_apart, size apart) {
    for (size a = 0; a < count; a++) memcpy(to + a * to_apart, from + a * apart, wide * 4);
}

/* Probabilities of `count` positions' queries; the first one's sees `m` keys, each next one more.
 * What only later ones of them see is zero. */
static void softmaxes(float *p, size m, size n, size group, size count) {
    for (size a = 0; a < count; a++)
        for (size c = 0; c < group; c++, p += n) {
            softmax(p, m + a);
            for (size j = m + a; j < m + count - 1; j++) p[j] = 0.0f;
        }
}

/* out [t, h, e]; room: n (3 e + h / g of all positions that go together) floats, n the most that a
 * row sees, in whole vectors. */
void attend(const float *qkv, const float *prefix_keys, const float *prefix_values,
            const int64_t *start, const int64_t *length, const int64_t *seen, const int64_t *slot,
            float *out, float *room, size b, size q, size shared, size h, size g, size e) {
    rows_t rows = {qkv, prefix_keys, prefix_values, start, length, seen, slot,
                   b,   q,           shared,        h,     g,      e};
    size all = h + 2 * g, group = h / g, at_once = together(group), wide = group * e;
    float factor = 1.0f / sqrtf((float)e), x[at_once * wide], y[at_once * wide];
    for (size r = 0; r < b; r++) {
        if (length[r] == 1 && !shared) {
            attend_one(&rows, r, factor, out, room);
            continue;
        }
        size before = seen_before(&rows, r), n = whole(before + length[r]);
        float *k = room, *k_turned = k + n * e, *v = k_turned + n * e;
        float *p = v + n * e;
        for (size head = 0; head < g; head++) {
            gather(&rows, r, head, 0, k, k_turned);
            gather(&rows, r, head, 1, v, 0);
            for (size i = 0, now; i < length[r]; i += now) {
                now = length[r] - i < at_once ? length[r] - i : at_once;
                size m = before + i + now, count = now * group;
                copied(x, qkv + ((start[r] + i) * all + head * group) * e, now, wide, wide, all * e);
                dots(x, k_turned, factor, p, m, n, e, count);
                softmaxes(p, before + i + 1, n, group, now);
                weighted(p, v, y, m, n, e, e, count);
                copied(out + ((start[r] + i) * h + head * group) * e, y, now, wide, h * e, wide);
            }
        }
    }
}

/* Gradients of qkv [t, h + 2 g, e] and of the prefixes, given that of out [t, h, e]. The
 * probabilities are computed again. room: n (6 e + twice those of `attend`) floats. */
void attend_back(const float *qkv, const float *prefix_keys, const float *prefix_values,
                 const int64_t *start, const int64_t *length, const float *g_out, float *g_qkv,
                 float *g_prefix_keys, float *g_prefix_values, float *room, size b, size q,
                 size shared, size h, size g, size e) {
    rows_t rows = {qkv, prefix_keys, prefix_values, start, length, 0, 0, b, q, shared, h, g, e};
    size all = h + 2 * g, group = h / g, at_once = together(group), wide = group * e;
    float factor = 1.0f / sqrtf((float)e), x[at_once * wide], go[at_once * wide], y[at_once * wide];
    for (size j = 0; j < shared; j++) memset(g_qkv + j * all * e, 0, all * e * 4);
    for (size r = 0; r < b; r++) {
        size before = seen_before(&rows, r), n = whole(before + length[r]);
        float *k = room, *k_turned = k + n * e, *v = k_turned + n * e, *v_turned = v + n * e;
        float *gk = v_turned + n * e, *gv = gk + n * e, *p = gv + n * e, *gp = p + at_once * group * n;
        for (size head = 0; head < g; head++) {
            gather(&rows, r, head, 0, k, k_turned);
            gather(&rows, r, head, 1, v, v_turned);
            memset(gk, 0, 2 * n * e * 4);
            for (size i = 0, now; i < length[r]; i += now) {
                now = length[r] - i < at_once ? length[r] - i : at_once;
                size m = before + i + now, count = now * group, first = head * group;
                copied(x, qkv + ((start[r] + i) * all + first) * e, now, wide, wide, all * e);
                copied(go, g_out + ((start[r] + i) * h + first) * e, now, wide, wide, h * e);
                dots(x, k_turned, factor, p, m, n, e, count);
                dots(go, v_turned, 1.0f, gp, m, n, e, count);
                softmaxes(p, before + i + 1, n, group, now);
                for (size c = 0; c < count; c++) {
                    float *own = p + c * n, *g_own = gp + c * n, mean = 0.0f;
                    size sees = before + i + 1 + c / group;
                    for (size j = 0; j < sees; j++) mean += own[j] * g_own[j];
                    for (size j = 0; j < sees; j++) g_own[j] = factor * own[j] * (g_own[j] - mean);
                    for (size j = sees; j < m; j++) g_own[j] = 0.0f;
                }
                weighted(gp, k, y, m, n, e, e, count);
                copied(g_qkv + ((start[r] + i) * all + first) * e, y, now, wide, all * e, wide);
                spread(gp, x, gk, m, n, e, count);
                spread(p, go, gv, m, n, e, count);
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
