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

/* Sums [32, 32] of 32 rows of a (16, unless `two`) with one panel: of int8, or of halves. k and
 * the stride are in bytes. Written for constant `two` and `halves`. */
INLINE void tile_sums(const char *a, size stride, const char *panel, size k, int two, int halves,
                      void *sums, size to) {
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size i = 0; i < k; i += BYTES, panel += 2 * ROWS * BYTES) {
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
    char *at = sums;
    _tile_stored(0, at, to * 4);
    _tile_stored(1, at + ROWS * 4, to * 4);
    if (two) {
        _tile_stored(2, at + ROWS * to * 4, to * 4);
        _tile_stored(3, at + ROWS * to * 4 + ROWS * 4, to * 4);
    }
}

static void tile_sums_of(const char *a, const char *panel, size k, int two, int halves, void *sums,
                         size to) {
    if (halves) {
        if (two) tile_sums(a, k, panel, k, 1, 1, sums, to);
        else tile_sums(a, k, panel, k, 0, 1, sums, to);
    } else {
        if (two) tile_sums(a, k, panel, k, 1, 0, sums, to);
        else tile_sums(a, k, panel, k, 0, 0, sums, to);
    }
}

/* y [m, n] <- a [m, k] times packed weights [n, k], plus bias [n] and rest [m, n] where given.
 *
 * int8: int32 sums, or, with `scale` [m], floats as `rescale` makes of them. `halves`: floats. With
 * `half` floats are rounded to halves. k, in bytes, is a multiple of 64 and n of 32; y begins at a
 * multiple of 64 bytes. room: 32 k bytes. Floats go past the caches: those kept for the way
 * back fill them otherwise, and reading what is to be overwritten took longer than the product. */
void tile_product(const char *a, const char *packed, int64_t halves, const float *scale,
                  const float *channel, const float *bias, const float *rest, void *y,
                  int64_t half, char *room, size m, size n, size k) {
    configure();
    int32_t sums[PANEL * PANEL] __attribute__((aligned(64)));
    size whole_rows = m / PANEL * PANEL, left = m - whole_rows;
    int as_they_are = !scale && !bias && !rest && !half;
    if (left) { /* the last rows, filled up with zeros */
        memcpy(room, a + whole_rows * k, left * k);
        memset(room + left * k, 0, (PANEL - left) * k);
    }
    for (size j = 0; j < n; j += PANEL, packed += PANEL * k)
        for (size i = 0; i < m; i += PANEL) {
            size rows = m - i < PANEL ? m - i : PANEL;
            const char *from = rows < PANEL ? room : a + i * k;
            if (as_they_are && rows == PANEL) {
                tile_sums_of(from, packed, k, 1, halves, (int32_t *)y + i * n + j, n);
                continue;
            }
            tile_sums_of(from, packed, k, rows > ROWS, halves, sums, PANEL);
            for (size r = 0; r < rows; r++) {
                const int32_t *sum = sums + r * PANEL;
                size at = (i + r) * n + j;
                if (as_they_are) {
                    memcpy((int32_t *)y + at, sum, PANEL * 4);
                    continue;
                }
                __m512 own = _mm512_set1_ps(scale ? scale[i + r] : 1.0f), two[2];
                for (size c = 0; c < PANEL; c += 16) {
                    __m512i bits = _mm512_load_si512(sum + c);
                    __m512 value = halves ? _mm512_castsi512_ps(bits)
                                          : _mm512_mul_ps(_mm512_cvtepi32_ps(bits), own);
                    if (channel) value = _mm512_mul_ps(value, _mm512_loadu_ps(channel + j + c));
                    if (bias) value = _mm512_add_ps(value, _mm512_loadu_ps(bias + j + c));
                    if (rest) value = _mm512_add_ps(value, _mm512_loadu_ps(rest + at + c));
                    two[c / 16] = value;
                }
                if (half) {
                    __m512bh both = _mm512_cvtne2ps_pbh(two[1], two[0]);
                    _mm512_stream_si512((__m512i *)((half_t *)y + at), (__m512i)both);
                } else {
                    _mm512_stream_ps((float *)y + at, two[0]);
                    _mm512_stream_ps((float *)y + at + 16, two[1]);
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

/* y [rows, n] <- (high + low) [32, k] times one panel, into its columns from j on. */
static void split_panel(const half_t *high, const half_t *low, size stride, const half_t *panel,
                       float *y, size rows, size n, size k, size j) {
    float sums[PANEL * PANEL] __attribute__((aligned(64)));
    size bytes = stride * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size i = 0; i < k; i += BYTES / 2, panel += ROWS * BYTES) {
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
            split_panel(room + at, low + at, stride, packed, y + b * PANEL * n, rows, n, k, j);
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
