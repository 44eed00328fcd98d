/* Products in AMX tiles: int8 and bfloat16. Compiled behind kernels.c, whose
 * types and functions it uses.
 *
 * A tile has 16 rows of 64 bytes. Two tiles of rows meet two of columns at a time, so that four
 * sums share what is loaded. Weights are packed once (`shoulders.lm.tiles.packed`): panels of 32
 * columns, so that a panel is read once, stays near, and serves all rows.
 */
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) \
    && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROWS 16     /* of a tile */
#define BYTES 64    /* of a tile's row */
#define PANEL 32    /* columns of two tiles */
#define NEAR (1 << 20) /* bytes that are read again before they leave the caches */
#define DEEP 640    /* bytes of a column that are used at a time: 20 KB of a panel */
#define SOON 4096   /* bytes ahead of what one block of rows is at */
#define WITHIN (1 << 18) /* bytes of sums that wait for the next piece of a panel */
#define PERMIT 0x1023, 18 /* ARCH_REQ_XCOMP_PERM of the tiles' data, see the kernel's docs */

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* Whether this process may use tiles: the kernel wants to be asked once. */
int tiles_ready(void) { return syscall(SYS_arch_prctl, PERMIT) == 0; }

static void configure(void) {
    tile_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.rows[i] = ROWS;
        shapes.bytes[i] = BYTES;
    }
    _tile_loadconfig(&shapes);
}

/* Fetch the lines of a step's tiles that are wanted later: `lines` from `*at` on. */
INLINE void fetch(const char **at, size lines) {
    for (size line = 0; line < lines; line++, *at += BYTES) _mm_prefetch(*at, _MM_HINT_T0);
}

/* Sums [32, 32] of 32 rows of a (16, unless `two`) with columns [k] of one panel, of int8 or of
 * halves, on top of those `before`, if any. k and the stride are in bytes; `to` is the stride of
 * sums. At each step `lines` are fetched from `next` on. For constant `two` and `halves`. */
INLINE void tile_sums(const char *a, size stride, const char *panel, size k, int two, int halves,
                      const char *next, size lines, const int32_t *before, int32_t *sums,
                      size to) {
    if (before) {
        _tile_loadd(0, before, PANEL * 4);
        _tile_loadd(1, before + ROWS, PANEL * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    if (two && before) {
        _tile_loadd(2, before + ROWS * PANEL, PANEL * 4);
        _tile_loadd(3, before + ROWS * PANEL + ROWS, PANEL * 4);
    } else if (two) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size i = 0; i < k; i += BYTES, panel += 2 * ROWS * BYTES) {
        fetch(&next, lines);
        _tile_loadd(4, a + i, stride);
        _tile_loadd(6, panel, BYTES);
        _tile_loadd(7, panel + ROWS * BYTES, BYTES);
        if (two) _tile_loadd(5, a + ROWS * stride + i, stride);
        if (halves) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (two) {
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        } else {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            if (two) {
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, to * 4);
    _tile_stored(1, sums + ROWS, to * 4);
    if (two) {
        _tile_stored(2, sums + ROWS * to, to * 4);
        _tile_stored(3, sums + ROWS * to + ROWS, to * 4);
    }
}

static void tile_sums_of(const char *a, size stride, const char *panel, size k, int two,
                         int halves, const char *next, size lines, const int32_t *before,
                         int32_t *sums, size to) {
#define SUMS(two, halves) tile_sums(a, stride, panel, k, two, halves, next, lines, before, sums, to)
    if (halves) {
        if (two) SUMS(1, 1);
        else SUMS(0, 1);
    } else {
        if (two) SUMS(1, 0);
        else SUMS(0, 0);
    }
}

/* What is done with a product's sums, see `tile_product`. */
typedef struct {
    const float *scale, *channel, *bias, *rest;
    char *y;
    int halves, half, past;
    size n;
} ending_t;

/* Turn sums [rows, 32] into y from row i and column j on. */
static void finish(const ending_t *as, const int32_t *sums, size i, size j, size rows) {
    for (size r = 0; r < rows; r++) {
        size at = (i + r) * as->n + j;
        __m512 own = _mm512_set1_ps(as->scale ? as->scale[i + r] : 1.0f), two[2];
        for (size c = 0; c < PANEL; c += 16) {
            __m512i bits = _mm512_load_si512(sums + r * PANEL + c);
            __m512 value = as->halves ? _mm512_castsi512_ps(bits)
                                      : _mm512_mul_ps(_mm512_cvtepi32_ps(bits), own);
            if (as->channel) value = _mm512_mul_ps(value, _mm512_loadu_ps(as->channel + j + c));
            if (as->bias) value = _mm512_add_ps(value, _mm512_loadu_ps(as->bias + j + c));
            if (as->rest) value = _mm512_add_ps(value, _mm512_loadu_ps(as->rest + at + c));
            two[c / 16] = value;
        }
        if (as->half) {
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(two[1], two[0]);
            __m512i *to = (__m512i *)(as->y + at * 2);
            if (as->past) _mm512_stream_si512(to, both);
            else _mm512_store_si512(to, both);
        } else for (size c = 0; c < 2; c++) {
            float *to = (float *)as->y + at + 16 * c;
            if (as->past) _mm512_stream_ps(to, two[c]);
            else _mm512_store_ps(to, two[c]);
        }
    }
}

/* y [m, n] <- a [m, k] times packed weights [n, k], plus bias [n] and rest [m, n] where given.
 *
 * int8: int32 sums, or, with `scale` [m], floats as `rescale` makes of them. `halves`: floats. With
 * `half` floats are rounded to halves. k, in bytes, is a multiple of 64 and n of 32; y begins at a
 * multiple of 64 bytes. room: 32 k + WITHIN bytes, from a multiple of 64 on. Many floats go past
 * the caches: those kept for the way back fill them otherwise, and reading what is to be
 * overwritten took longer than the product.
 *
 * A piece of a panel, 32 columns of at most DEEP bytes, stays in the nearest cache and meets all
 * rows of a group there; sums wait for the next piece outside of it. Sums of int8 are exact, and
 * those of halves are added in the same order whatever the pieces are. */
void tile_product(const char *a, const char *packed, int64_t halves, const float *scale,
                  const float *channel, const float *bias, const float *rest, void *y,
                  int64_t half, char *room, size m, size n, size k) {
    configure();
    int32_t sums[PANEL * PANEL] __attribute__((aligned(64)));
    int32_t *waiting = (int32_t *)(room + PANEL * k);
    size pieces = (k + DEEP - 1) / DEEP, deep = (k / BYTES + pieces - 1) / pieces * BYTES;
    size most = NEAR / k / PANEL * PANEL;
    if (most * PANEL * 4 > WITHIN) most = WITHIN / (PANEL * 4);
    if (most < PANEL) most = PANEL;
    ending_t as = {scale, channel, bias, rest, y, halves, half, m * n * (half ? 2 : 4) > 4 * NEAR, n};
    int as_they_are = !scale && !bias && !rest && !half;
    size left = m % PANEL;
    if (left) { /* the last rows, filled up with zeros */
        memcpy(room, a + (m - left) * k, left * k);
        memset(room + left * k, 0, (PANEL - left) * k);
    }
    for (size first = 0; first < m; first += most) {
        size end = first + most < m ? first + most : m, blocks = (end - first + PANEL - 1) / PANEL;
        /* each block of rows fetches its share of the piece that comes next */
        size share = (PANEL + blocks - 1) / blocks;
        for (size j = 0; j < n; j += PANEL)
            for (size at = 0; at < k; at += deep) {
                size own = k - at < deep ? k - at : deep;
                const char *piece = packed + j * k + at * PANEL;
                const char *next = piece + (blocks > 1 ? own * PANEL : SOON);
                int last = at + own == k;
                for (size i = first, block = 0; i < end; i += PANEL, block++) {
                    size rows = m - i < PANEL ? m - i : PANEL;
                    int direct = last && as_they_are && rows == PANEL;
                    const char *from = rows < PANEL ? room + at : a + i * k + at;
                    int32_t *held = waiting + block * PANEL * PANEL;
                    tile_sums_of(from, k, piece, own, rows > ROWS, halves,
                                 next + block * share * own, block * share < PANEL ? share : 0,
                                 at ? held : 0,
                                 direct ? (int32_t *)y + i * n + j : last ? sums : held,
                                 direct ? n : PANEL);
                    if (!last || direct) continue;
                    if (as_they_are)
                        for (size r = 0; r < rows; r++)
                            memcpy((int32_t *)y + (i + r) * n + j, sums + r * PANEL, PANEL * 4);
                    else finish(&as, sums, i, j, rows);
                }
            }
    }
    _tile_release();
}

/* A float is split into two halves, which hold 16 bits of it together.
 * high + low [32, stride] <- x [rows, n], zeros where there is no row. */
static void split_rows(const float *x, half_t *high, half_t *low, size rows, size n, size stride) {
    for (size r = 0; r < PANEL; r++)
        for (size i = 0; i < n; i++) {
            float value = r < rows ? x[r * n + i] : 0.0f;
            half_t first = to_half(value);
            high[r * stride + i] = first;
            low[r * stride + i] = to_half(value - of_half(first));
        }
}

/* y [rows, n] <- (high + low) [32, k] times one panel, into its columns from j on. `soon`: fetch what
 * comes next. */
static void split_panel(const half_t *high, const half_t *low, size stride, const half_t *panel,
                        float *y, size rows, size n, size k, size j, int soon) {
    float sums[PANEL * PANEL] __attribute__((aligned(64)));
    size bytes = stride * 2;
    const char *next = (const char *)panel + SOON;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size i = 0; i < k; i += BYTES / 2, panel += ROWS * BYTES) {
        if (soon) fetch(&next, PANEL);
        _tile_loadd(6, panel, BYTES);
        _tile_loadd(7, panel + ROWS * BYTES / 2, BYTES);
        _tile_loadd(4, high + i, bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(4, low + i, bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (rows <= ROWS) continue;
        _tile_loadd(5, high + ROWS * stride + i, bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(5, low + ROWS * stride + i, bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, PANEL * 4);
    _tile_stored(1, sums + ROWS, PANEL * 4);
    _tile_stored(2, sums + ROWS * PANEL, PANEL * 4);
    _tile_stored(3, sums + ROWS * PANEL + ROWS, PANEL * 4);
    for (size r = 0; r < rows; r++) memcpy(y + r * n + j, sums + r * PANEL, PANEL * 4);
}

/* y [m, n] <- x [m, k] times packed bfloat16 weights [n, k]; n and k are multiples of 32.
 * room: whole(m) * (k + 32) * 2 halves, whole(m) being m rounded up to 32. Rows of the room are
 * 64 bytes longer than k, lest they all fall into one set of the cache. */
void split_product(const float *x, const half_t *packed, float *y, half_t *room, size m, size n,
                   size k) {
    size stride = k + PANEL, blocks = (m + PANEL - 1) / PANEL;
    half_t *low = room + blocks * PANEL * stride;
    for (size b = 0; b < blocks; b++) {
        size rows = m - b * PANEL < PANEL ? m - b * PANEL : PANEL, at = b * PANEL * stride;
        split_rows(x + b * PANEL * k, room + at, low + at, rows, k, stride);
    }
    configure();
    for (size j = 0; j < n; j += PANEL, packed += PANEL * k)
        for (size b = 0; b < blocks; b++) {
            size rows = m - b * PANEL < PANEL ? m - b * PANEL : PANEL, at = b * PANEL * stride;
            split_panel(room + at, low + at, stride, packed, y + b * PANEL * n, rows, n, k, j,
                        b == 0);
        }
    _tile_release();
}

/* losses [m] <- negative log-likelihood of targets [m] for states x [m, k], and, unless NULL,
 * g [m, k] <- its gradient. packed: the head [n, k]; packed_back: its transpose. Logits are made
 * and used for GROUP rows at a time. room: see `Kernels.head_losses`. */
#define GROUP 64
void head_losses(const float *x, const half_t *packed, const half_t *packed_back,
                 const int64_t *targets, float *losses, float *g, float *logits, half_t *room,
                 size m, size n, size k) {
    for (size i = 0; i < m; i += GROUP) {
        size rows = m - i < GROUP ? m - i : GROUP;
        split_product(x + i * k, packed, logits, room, rows, n, k);
        for (size r = 0; r < rows; r++) {
            float *y = logits + r * n, largest = y[0], sum = 0.0f, own = y[targets[i + r]];
            for (size j = 1; j < n; j++) largest = y[j] > largest ? y[j] : largest;
            for (size j = 0; j < n; j++) {
                y[j] = exponential(y[j] - largest) + (y[j] - y[j]); /* a NaN stays one */
                sum += y[j];
            }
            losses[i + r] = logf(sum) + largest - own;
            if (!g) continue;
            float inverse = 1.0f / sum;
            for (size j = 0; j < n; j++) y[j] *= inverse;
            y[targets[i + r]] -= 1.0f;
        }
        if (g) split_product(logits, packed_back, g + i * k, room, rows, k, n);
    }
}
#else
int tiles_ready(void) { return 0; }
#endif
