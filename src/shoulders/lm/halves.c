/* What stands between bfloat16 products of a Llama-style layer: the norms and gates of kernels.c
 * (whose types and functions these use), written as halves in place of rounded levels.
 */

/* y [m, n] <- RMS norm of x [m, n] with weight [n]. */
void norm_half(const float *x, const float *weight, float epsilon, half_t *y, size m, size n) {
    for (size j = 0; j < m; j++) {
        const float *from = x + j * n;
        float inverse = inverse_rms(from, n, epsilon);
        for (size i = 0; i < n; i++) y[j * n + i] = to_half(weight[i] * (from[i] * inverse));
    }
}

/* y [m, n] <- silu(gate) * up, from gate_up [m, 2 n]. */
void gate_half(const half_t *gate_up, half_t *y, size m, size n) {
    for (size j = 0; j < m; j++) {
        const half_t *gate = gate_up + j * 2 * n, *up = gate + n;
        for (size i = 0; i < n; i++) {
            float g = of_half(gate[i]);
            y[j * n + i] = to_half(g * sigmoid(g) * of_half(up[i]));
        }
    }
}

/* y [m, 2 n] <- gradient of gate_up, where that of silu(gate) * up is g [m, n]. */
void gate_back_half(const float *g, const half_t *gate_up, half_t *y, size m, size n) {
    for (size j = 0; j < m; j++) {
        const half_t *gates = gate_up + j * 2 * n, *ups = gates + n;
        half_t *to = y + j * 2 * n;
        for (size i = 0; i < n; i++) {
            float gate = of_half(gates[i]), up = of_half(ups[i]), on = sigmoid(gate);
            float own = g[j * n + i];
            to[i] = to_half(own * up * on * (1.0f + gate * (1.0f - on)));
            to[n + i] = to_half(own * gate * on);
        }
    }
}

/* y [m, n] <- rest + gradient of x through its RMS norm, where the norm's output has g [m, n]. */
void norm_back_float(const float *g, const float *x, const float *weight, float epsilon,
                     const float *rest, float *y, size m, size n) {
    for (size j = 0; j < m; j++) {
        const float *from = x + j * n, *own = g + j * n;
        float inverse = inverse_rms(from, n, epsilon), sum = 0.0f;
        for (size i = 0; i < n; i++) sum += own[i] * weight[i] * from[i];
        float mean = sum * inverse * inverse / (float)n;
        for (size i = 0; i < n; i++)
            y[j * n + i] = rest[j * n + i] + inverse * (own[i] * weight[i] - from[i] * mean);
    }
}
