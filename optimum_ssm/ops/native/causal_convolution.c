/* Copyright 2026 The optimum_ssm authors. All rights reserved.
 * SPDX-License-Identifier: Apache-2.0
 *
 * The short causal convolution before a scan, one filter per channel, with SiLU. Its input is read and its output written
 * with neighbouring channels side by side, as the projections before and after it have them: no transposed copies. */

#include "vectors.h"

/* Steps that a thread takes at once. */
#define ROWS 64
#define WORK_OF_A_THREAD 200000 /* outputs, about 0.1 ms */

/* The fields of `Convolution` in native_convolution.py, in its order: 8 bytes each. Strides count elements. */
struct convolution {
    const float *x, *weight, *bias; /* [B, I, L] with channels side by side; [K, I], [I]: contiguous; bias may be NULL */
    float *y;                       /* [B, L, I], contiguous, written */
    int64_t batch, channels, length, taps, silu, threads, x_batch, x_step;
    int64_t next; /* 0 */
};

/* One step of one sequence. `width` channels from `channel` on: a vector, or what is left of one. */
static inline __attribute__((always_inline)) void convolve(const struct convolution *c, int64_t sequence, int64_t t,
                                                           int64_t channel, const int width)
{
    const float *x = c->x + sequence * c->x_batch + t * c->x_step + channel, *weight = c->weight + channel;
    float *y = c->y + (sequence * c->length + t) * c->channels + channel;
    vec sum = splat(0.0f);
    if (c->bias)
        memcpy(&sum, c->bias + channel, 4 * width);
    for (int64_t k = t < c->taps - 1 ? c->taps - 1 - t : 0; k < c->taps; k++) {
        vec tap = splat(0.0f), seen = splat(0.0f);
        memcpy(&tap, weight + k * c->channels, 4 * width);
        memcpy(&seen, x + (k - c->taps + 1) * c->x_step, 4 * width);
        sum = fma(tap, seen, sum);
    }
    if (c->silu)
        sum = silu(sum);
    memcpy(y, &sum, 4 * width);
}

static void work(void *job)
{
    struct convolution *c = job;
    const int64_t per_sequence = (c->length + ROWS - 1) / ROWS;
    for (;;) {
        const int64_t index = take(&c->next);
        if (index >= c->batch * per_sequence)
            return;
        const int64_t start = index % per_sequence * ROWS, end = start + ROWS;
        const int64_t stop = end < c->length ? end : c->length, whole = c->channels / LANES * LANES;
        for (int64_t t = start; t < stop; t++) { /* step by step, as memory is read fast in the order in which it lies */
            for (int64_t channel = 0; channel < whole; channel += LANES)
                convolve(c, index / per_sequence, t, channel, LANES);
            if (whole < c->channels)
                convolve(c, index / per_sequence, t, whole, (int)(c->channels - whole));
        }
    }
}

void optimum_ssm_causal_convolution(struct convolution *c)
{
    in_threads(work, c, team(c->batch * c->channels * c->length / WORK_OF_A_THREAD, c->threads));
}
