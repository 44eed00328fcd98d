/* All layers of a Llama-style LM over a cache, without gradients, in one call: what Python would do
 * between some ten functions a layer takes longer than they do for a few rows. Compiled behind
 * tiles.c and pairs.c, one of which multiplies; types and functions are also those of kernels.c,
 * halves.c, products.c and attention.c.
 */
#if defined(ROWS) || defined(PAIRS)
typedef struct {
    const char *packed;
    const float *scale, *bias;
    const float *reads, *writes; /* what channels were divided by, or NULL: shoulders.lm.smooth */
} matrix_t;

typedef struct {
    const float *attention_norm, *feed_norm;
    matrix_t qkv, output, gate_up, down;
} layer_t;

/* Low-rank changes of one skill. Between layers (shoulders.lm.updates): down [layers, d, r], up
 * [layers, r, d], unit [layers]. Or inside them (shoulders.lm.factors), for each product of a layer
 * A [layers, k, r] and B [layers, r, n]. What there is not is NULL. */
enum { QKV, OUTPUT, GATE_UP, DOWN, SITES };
typedef struct {
    const float *down, *up, *unit;
    struct { const float *a, *b; } inside[SITES];
    size rank;
} update_t;

/* x [t, d] <- x + u up down n(x), for positions of updates[which[i]], -1 for none. Sums of a position
 * do not depend on what stands beside it. room: MOST (2 d + largest rank) floats. */
static void update_states(const update_t *updates, const int64_t *which, size layer, float *x,
                          float *room, size t, size d) {
    for (size i = 0, count; i < t; i += count) {
        for (count = 1; count < MOST && i + count < t && which[i + count] == which[i];) count++;
        if (which[i] < 0 || !updates[which[i]].down) continue;
        const update_t *own = updates + which[i];
        size r = own->rank;
        float *normal = room, *added = normal + MOST * d, *read = added + MOST * d;
        for (size c = 0; c < count; c++) {
            const float *from = x + (i + c) * d;
            float inverse = inverse_rms(from, d, 1e-6f);
            for (size j = 0; j < d; j++) normal[c * d + j] = from[j] * inverse;
        }
        weighted(normal, own->down + layer * d * r, read, d, d, r, r, count);
        weighted(read, own->up + layer * r * d, added, r, r, d, d, count);
        for (size j = 0; j < count * d; j++) x[i * d + j] += own->unit[layer] * added[j];
    }
}

/* y [t, n], floats or halves, += x A B, where x [t, k] is what was rounded last (halves, or levels
 * with their scale) and a position's pair that of updates[which[i]]. Sums of a position do not
 * depend on what stands beside it. room: MOST (k + n + largest rank) floats. */
static void add_factors(const update_t *updates, const int64_t *which, size layer, int site,
                        const void *levels, const float *scale, const matrix_t *by, int halves,
                        void *y, int half, float *room, size t, size n, size k) {
    for (size i = 0, count; i < t; i += count) {
        for (count = 1; count < MOST && i + count < t && which[i + count] == which[i];) count++;
        if (which[i] < 0 || !updates[which[i]].inside[site].a) continue;
        const update_t *own = updates + which[i];
        size r = own->rank;
        float *x = room, *added = x + MOST * k, *read = added + MOST * n;
        for (size c = 0; c < count; c++) {
            float *to = x + c * k;
            const half_t *half_levels = (const half_t *)levels + (i + c) * k;
            const int8_t *int_levels = (const int8_t *)levels + (i + c) * k;
            if (halves) for (size j = 0; j < k; j++) to[j] = of_half(half_levels[j]);
            else for (size j = 0; j < k; j++) to[j] = int_levels[j] * scale[i + c];
            if (by->reads) for (size j = 0; j < k; j++) to[j] *= by->reads[j];
        }
        weighted(x, own->inside[site].a + layer * k * r, read, k, k, r, r, count);
        weighted(read, own->inside[site].b + layer * r * n, added, r, r, n, n, count);
        for (size c = 0; c < count; c++) {
            float *from = added + c * n, *plain = (float *)y + (i + c) * n;
            half_t *halved = (half_t *)y + (i + c) * n;
            if (by->writes) for (size j = 0; j < n; j++) from[j] /= by->writes[j];
            if (half)
                for (size j = 0; j < n; j++) halved[j] = to_half(of_half(halved[j]) + from[j]);
            else for (size j = 0; j < n; j++) plain[j] += from[j];
        }
    }
}

/* Take so many bytes of the room, from a multiple of 64 on. */
static void *taken(char **room, size bytes) {
    char *at = *room;
    *room += (bytes + 63) / 64 * 64;
    return at;
}

/* y [t, n] <- what was rounded last, [t, k], times a matrix. */
static void times_matrix(const void *levels, const float *scale, const matrix_t *by, int halves,
                         const float *rest, void *y, int half, char *spare, size t, size n,
                         size k) {
#if defined(PAIRS)
    pair_product(levels, (const int8_t *)by->packed, scale, by->scale, by->bias, rest, y, spare, t,
                 n, k);
#else
    tile_product(levels, by->packed, halves, halves ? 0 : scale, by->scale, by->bias, rest, y, half,
                 spare, t, n, halves ? 2 * k : k);
#endif
}

#if defined(PAIRS)
#define GATES_HALF 0
#else
#define GATES_HALF 1 /* what the gates read is written as halves */
#endif

/* x [t, d] <- the last layer's output; the cache [layers, 2, block], block being slots times q
 * positions of [g, e], takes the keys and values of position i at places[i]. Weights are int8, or
 * halves with scales of NULL. f: width of the feed-forward network. room: see
 * `shoulders.lm.layers`. Rows are as in `attend`, updates (or NULL) as in `update_states`. */
void read_layers(const layer_t *layers, size count, int64_t halves, float *x, float *cache,
                 size block, const int64_t *places, const float *cosine, const float *sine,
                 const int64_t *start, const int64_t *length, const int64_t *seen,
                 const int64_t *slot, const update_t *updates, const int64_t *which, size rank,
                 float epsilon, char *room, size most, size t, size b, size q, size d, size f,
                 size h, size g, size e) {
    size all = h + 2 * g, widest = d > f ? d : f;
    widest = h * e > widest ? h * e : widest;
    void *levels = taken(&room, t * widest * 2);
    float *scale = taken(&room, t * 4), *row = taken(&room, widest * 4);
    float *qkv = taken(&room, t * all * e * 4), *read = taken(&room, t * h * e * 4);
    float *middle = taken(&room, t * d * 4);
    void *gate_up = taken(&room, t * 2 * f * (GATES_HALF ? 2 : 4));
    float *attending = taken(&room, most * (3 * e + h / g * together(h / g)) * 4);
    char *spare = taken(&room, PANEL * widest * 2 + WITHIN);
    size most_written = 2 * f > all * e ? 2 * f : all * e;
    most_written = d > most_written ? d : most_written;
    float *updating = taken(&room, updates ? MOST * (widest + most_written + rank) * 4 : 0);
#define FACTORS(site, matrix, y, half, n, k)                                                      \
    if (updates)                                                                                  \
        add_factors(updates, which, l, site, levels, scale, &own->matrix, halves, y, half,        \
                    updating, t, n, k)
    for (size l = 0; l < count; l++) {
        const layer_t *own = layers + l;
        float *keys = cache + l * 2 * block, *values = keys + block;
        if (halves) norm_half(x, own->attention_norm, epsilon, levels, t, d);
        else norm_round(x, own->attention_norm, epsilon, levels, scale, row, t, d);
        times_matrix(levels, scale, &own->qkv, halves, 0, qkv, 0, spare, t, all * e, d);
        FACTORS(QKV, qkv, qkv, 0, all * e, d);
        rotate(qkv, cosine, sine, 1.0f, t, h + g, all, e);
        attend(qkv, keys, values, start, length, seen, slot, read, attending, b, q, 0, h, g, e);
        if (halves) for (size i = 0; i < t * h * e; i++) ((half_t *)levels)[i] = to_half(read[i]);
        else round_rows(read, 0, levels, scale, row, t, h * e);
        times_matrix(levels, scale, &own->output, halves, x, middle, 0, spare, t, d, h * e);
        FACTORS(OUTPUT, output, middle, 0, d, h * e);
        if (halves) norm_half(middle, own->feed_norm, epsilon, levels, t, d);
        else norm_round(middle, own->feed_norm, epsilon, levels, scale, row, t, d);
        times_matrix(levels, scale, &own->gate_up, halves, 0, gate_up, GATES_HALF, spare, t, 2 * f, d);
        FACTORS(GATE_UP, gate_up, gate_up, GATES_HALF, 2 * f, d);
        if (halves) gate_half(gate_up, levels, t, f);
        else gate_round(gate_up, GATES_HALF, levels, scale, row, t, f);
        times_matrix(levels, scale, &own->down, halves, middle, x, 0, spare, t, d, f);
        FACTORS(DOWN, down, x, 0, d, f);
        if (updates) update_states(updates, which, l, x, updating, t, d);
        for (size i = 0; i < t; i++) {
            memcpy(keys + places[i] * g * e, qkv + (i * all + h) * e, g * e * 4);
            memcpy(values + places[i] * g * e, qkv + (i * all + h + g) * e, g * e * 4);
        }
    }
}
#endif
