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

/* Steps [start, stop) of one sequence and `width` channels: a vector, or what is left of one. */
static void convolve(const struct convolution *c, int64_t sequence, int64_t channel, int width, int64_t start, int64_t stop)
{
    const float *x = c->x + sequence * c->x_batch + channel;
    float *y = c->y + sequence * c->length * c->channels + channel;
    vec bias = splat(0.0f);
    if (c->bias)
        memcpy(&bias, c->bias + channel, 4 * width);
    for (int64_t t = start; t < stop; t++) {
        vec sum = bias;
        for (int64_t k = t < c->taps - 1 ? c->taps - 1 - t : 0; k < c->taps; k++) {
            vec weight = splat(0.0f), seen = splat(0.0f);
            const float *from = x + (t - c->taps + 1 + k) * c->x_step;
            if (width == LANES) {
                memcpy(&weight, c->weight + k * c->channels + channel, sizeof(vec));
                memcpy(&seen, from, sizeof(vec));
            } else {
                memcpy(&weight, c->weight + k * c->channels + channel, 4 * width);
                memcpy(&seen, from, 4 * width);
            }
            sum = fma(weight, seen, sum);
        }
        if (c->silu)
            sum = silu(sum);
        if (width == LANES)
            memcpy(y + t * c->channels, &sum, sizeof(vec));
        else
            memcpy(y + t * c->channels, &sum, 4 * width);
    }
}

static void *work(void *job)
{
    struct convolution *c = job;
    const int64_t per_sequence = (c->length + ROWS - 1) / ROWS;
    for (;;) {
        const int64_t index = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED);
        if (index >= c->batch * per_sequence)
            return NULL;
        const int64_t start = index % per_sequence * ROWS, end = start + ROWS;
        for (int64_t channel = 0; channel < c->channels; channel += LANES) {
            const int64_t left = c->channels - channel;
            convolve(c, index / per_sequence, channel, left < LANES ? (int)left : LANES, start,
                     end < c->length ? end : c->length);
        }
    }
}

void optimum_ssm_causal_convolution(struct convolution *c)
{
    const int64_t worth = c->batch * c->channels * c->length / WORK_OF_A_THREAD;
    in_threads(work, c, worth < c->threads ? worth : c->threads);
}
