/* Products where the processor has neither tiles nor instructions for int8 (AVX2 alone). Of int8: as
 * pairs of int16, two products and their sum in one instruction, twice as many as of floats; sums are
 * exact, as in tiles. Of floats with bfloat16 weights: half the bytes where one row reads them all.
 * Compiled behind tiles.c; kernels.c has types and functions.
 *
 * Weights are packed once (`shoulders.lm.pairs.packed`): panels of 16 columns, in which two
 * neighbours in k of each column stand beside each other. Rows are widened to int16 a group at a
 * time, and stay near while every panel meets them.
 */
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512VNNI__) && !defined(ROWS)
#include <immintrin.h>

#define PAIRS
#define ACROSS 16 /* columns of a panel: two vectors of sums */
#define TALL 6    /* rows that meet a panel at once: 12 vectors of sums and what they read */
#define PANEL 32  /* of these two the room is made, as for tiles */
#define WITHIN (1 << 18)

int pairs_ready(void) { return 1; }

/* Sums [rows, 16] of rows of a, stride apart, with one panel. Written for constant `rows`. */
INLINE void pair_sums(const int16_t *a, size stride, const int8_t *panel, size k, int rows,
                      int32_t *sums) {
    __m256i left[TALL], right[TALL];
    for (int r = 0; r < rows; r++) left[r] = right[r] = _mm256_setzero_si256();
    for (size i = 0; i < k; i += 2, panel += 2 * ACROSS) {
        __m256i one = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)panel));
        __m256i two = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)panel + 1));
        for (int r = 0; r < rows; r++) {
            int32_t both;
            memcpy(&both, a + r * stride + i, 4);
            __m256i pair = _mm256_set1_epi32(both);
            left[r] = _mm256_add_epi32(left[r], _mm256_madd_epi16(pair, one));
            right[r] = _mm256_add_epi32(right[r], _mm256_madd_epi16(pair, two));
        }
    }
    for (int r = 0; r < rows; r++) {
        _mm256_store_si256((__m256i *)(sums + r * ACROSS), left[r]);
        _mm256_store_si256((__m256i *)(sums + r * ACROSS) + 1, right[r]);
    }
}

static void pair_sums_of(const int16_t *a, size stride, const int8_t *panel, size k, size rows,
                         int32_t *sums) {
    switch (rows) {
    case 1: pair_sums(a, stride, panel, k, 1, sums); break;
    case 2: pair_sums(a, stride, panel, k, 2, sums); break;
    case 3: pair_sums(a, stride, panel, k, 3, sums); break;
    case 4: pair_sums(a, stride, panel, k, 4, sums); break;
    case 5: pair_sums(a, stride, panel, k, 5, sums); break;
    default: pair_sums(a, stride, panel, k, TALL, sums);
    }
}

/* y [m, n] <- levels [m, k] times packed weights [n, k], plus bias [n] and rest [m, n] where given:
 * as `tile_product` of int8, but never halves, which gain nothing beside products that take three
 * times as long. n is a multiple of 16, k of 2; room: 32 k + WITHIN bytes. */
void pair_product(const int8_t *levels, const int8_t *packed, const float *scale,
                  const float *channel, const float *bias, const float *rest, void *y,
                  char *room, size m, size n, size k) {
    int32_t sums[TALL * ACROSS] __attribute__((aligned(32)));
    int16_t *wide = (int16_t *)room;
    size most = WITHIN / (2 * k) / TALL * TALL;
    if (most < TALL) most = TALL; /* 12 k bytes */
    for (size first = 0; first < m; first += most) {
        size group = first + most < m ? most : m - first;
        for (size i = 0; i < group * k; i++) wide[i] = levels[first * k + i];
        for (size j = 0; j < n; j += ACROSS)
            for (size i = 0; i < group; i += TALL) {
                size rows = group - i < TALL ? group - i : TALL;
                pair_sums_of(wide + i * k, k, packed + j * k, k, rows, sums);
                for (size r = 0; r < rows; r++) {
                    size row = first + i + r, at = row * n + j;
                    const int32_t *from = sums + r * ACROSS;
                    if (!scale) {
                        memcpy((int32_t *)y + at, from, ACROSS * 4);
                        continue;
                    }
                    float value[ACROSS], own = scale[row];
                    for (int c = 0; c < ACROSS; c++) value[c] = (float)from[c] * own;
                    if (channel) for (int c = 0; c < ACROSS; c++) value[c] *= channel[j + c];
                    if (bias) for (int c = 0; c < ACROSS; c++) value[c] += bias[j + c];
                    if (rest) for (int c = 0; c < ACROSS; c++) value[c] += rest[at + c];
                    memcpy((float *)y + at, value, ACROSS * 4);
                }
            }
    }
}

/* Sums [rows, 16] of rows of x [., k] with one panel of halves. Written for constant `rows`. */
INLINE void wide_sums(const float *x, const half_t *panel, size k, int rows, float *y, size n) {
    __m256 left[TALL], right[TALL];
    for (int r = 0; r < rows; r++) left[r] = right[r] = _mm256_setzero_ps();
    for (size i = 0; i < k; i++, panel += ACROSS) {
        __m128i low = _mm_loadu_si128((const __m128i *)panel);
        __m128i high = _mm_loadu_si128((const __m128i *)panel + 1);
        __m256 one = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16));
        __m256 two = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16));
        for (int r = 0; r < rows; r++) {
            __m256 own = _mm256_broadcast_ss(x + r * k + i);
            left[r] = _mm256_fmadd_ps(own, one, left[r]);
            right[r] = _mm256_fmadd_ps(own, two, right[r]);
        }
    }
    for (int r = 0; r < rows; r++) {
        _mm256_storeu_ps(y + r * n, left[r]);
        _mm256_storeu_ps(y + r * n + 8, right[r]);
    }
}

/* y [m, n] <- x [m, k] times packed bfloat16 weights [n, k], a multiple of 16 of them: panels of 16
 * columns, all of k after each other. */
void wide_product(const float *x, const half_t *packed, float *y, size m, size n, size k) {
    for (size j = 0; j < n; j += ACROSS)
        for (size i = 0; i < m; i += TALL) {
            const half_t *panel = packed + j * k;
            const float *from = x + i * k;
            float *to = y + i * n + j;
            switch (m - i) {
            case 1: wide_sums(from, panel, k, 1, to, n); break;
            case 2: wide_sums(from, panel, k, 2, to, n); break;
            case 3: wide_sums(from, panel, k, 3, to, n); break;
            case 4: wide_sums(from, panel, k, 4, to, n); break;
            case 5: wide_sums(from, panel, k, 5, to, n); break;
            default: wide_sums(from, panel, k, TALL, to, n);
            }
        }
}
#else
int pairs_ready(void) { return 0; }
#endif
