/* Copyright 2026 The optimum_ssm authors. All rights reserved.
 * SPDX-License-Identifier: Apache-2.0
 *
 * The Mamba-1 selective scan with sums over time, for a CPU: what `native_selective_scan.py` compiles, loads and calls.
 *
 * A vector holds LANES channels. Time runs in blocks: x, delta, z and y of a block become tiles of [steps, LANES] for all
 * vectors of a panel, so that memory is read and written in long rows. The tiles of one vector stay in the first-level
 * cache, and of one state index after the other the state, its rate and its sums stay in registers over all steps of the
 * block. No decay and no state is ever written, but for the sums that are kept for every
 * step: those go through a buffer of one block, to which all sequences add before it is added to the caller's tensor,
 * whose rows are a page apart.
 *
 * Threads take panels of up to PANEL vectors of channels, with all sequences and all of time. So whoever computes a sum
 * owns it, and equal inputs give equal bits whatever the number of threads.
 *
 * Arithmetic is float32; sums over one block are float32 too and are added up in float64. */

#include "vectors.h"

#define PANEL (128 / LANES)
#define MOST_STEPS 64
/* States times steps that are worth a thread, about 0.2 ms of work. */
#define WORK_OF_A_THREAD 500000

/* The fields of `Call` in native_selective_scan.py, in its order: 8 bytes each. Strides count elements. */
struct call {
    const float *x, *dt, *z, *B, *C;  /* x, dt, z: [B, I, L]; B, C: [B, N, L]; z may be NULL */
    const float *A, *D, *delta_bias;  /* [I, N], [I], [I], contiguous; D and delta_bias may be NULL */
    float *y, *last_state;            /* [B, L, I], [B, N, I], contiguous, written */
    double *decay_error, *state_energy, *state_prev_total, *gate_energy; /* [N, I], [I], contiguous, written, or NULL */
    void *state_prev, *decay_sum;     /* [L, I, N], added to, or NULL */
    int64_t batch, channels, states, length, softplus, state_prev_is_double, decay_sum_is_double, threads;
    int64_t x_strides[3], dt_strides[3], z_strides[3], B_strides[3], C_strides[3];
    int64_t state_prev_strides[3], decay_sum_strides[3];
};

typedef vec tile[MOST_STEPS];

/* What one thread computes with. */
struct room {
    vec *state;                                       /* [B, PANEL, N] */
    vec *rates;                                       /* [PANEL, N] */
    double *decay_error, *state_energy, *state_prev;  /* [PANEL, N, LANES] */
    double *gate;                                     /* [PANEL, LANES] */
    float *prev_buffer, *decay_buffer;                /* [steps, N, PANEL, LANES] */
    tile x[PANEL], delta[PANEL], z[PANEL], y[PANEL], drive;
};

struct job {
    const struct call *call;
    int64_t panel, next, failed; /* vectors in a panel, the first panel that nobody took, whether memory ran out */
};

enum { DECAY_ERROR = 1, STATE_ENERGY = 2, STATE_PREV_TOTAL = 4, STATE_PREV = 8, DECAY_SUM = 16 };

/* max(v, 0) + log(1 + exp(-|v|)), the logarithm as 2 atanh(u / (2 + u)): its series ends below float32 rounding, as its
 * argument is at most 1/3. The plain logarithm of 1 + u would lose small time steps to rounding. */
static inline vec softplus(vec v)
{
    vec small = exponential((vec)((ivec)v | INT32_MIN));
    vec ratio = small / (small + 2.0f), square = ratio * ratio;
    vec series = fma(square, splat(1.0f / 15.0f), splat(1.0f / 13.0f));
    series = fma(series, square, splat(1.0f / 11.0f));
    series = fma(series, square, splat(1.0f / 9.0f));
    series = fma(series, square, splat(1.0f / 7.0f));
    series = fma(series, square, splat(1.0f / 5.0f));
    series = fma(series, square, splat(1.0f / 3.0f));
    series = fma(series, square, splat(1.0f));
    return larger(v, splat(0.0f)) + 2.0f * ratio * series;
}

#ifdef HAS_SHUFFLES
/* Rows of LANES floats, `row_stride` apart, turned into columns: every round interleaves row i with row i + LANES / 2. */
static inline void transpose(vec *to, const float *from, int64_t row_stride)
{
    vec rows[LANES], next[LANES];
    for (int i = 0; i < LANES; i++)
        memcpy(&rows[i], from + i * row_stride, sizeof(vec));
    for (int round = 1; round < LANES; round *= 2) {
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = __builtin_shufflevector(rows[i], rows[i + LANES / 2], ZIP_LOW);
            next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + LANES / 2], ZIP_HIGH);
        }
        memcpy(rows, next, sizeof(rows));
    }
    memcpy(to, rows, sizeof(rows));
}
#endif

/* Tiles from `width` channels of a tensor with any strides; lanes beyond are 0. Where channels lie side by side all tiles
 * are filled step by step: steps are a page apart or more. */
static void load(tile *tiles, const float *from, int64_t channel_stride, int64_t step_stride, int width, int steps)
{
    const int whole = width / LANES, vectors = (width + LANES - 1) / LANES;
    if (whole < vectors)
        memset(tiles[whole], 0, sizeof(vec) * steps);
    int first = 0; /* the first step that is left to do of whole vectors */
    if (channel_stride == 1)
        for (; first < steps; first++)
            for (int v = 0; v < whole; v++)
                tiles[v][first] = *(const loose_vec *)(from + first * step_stride + v * LANES);
#ifdef HAS_SHUFFLES
    else if (step_stride == 1)
        for (; first + LANES <= steps; first += LANES)
            for (int v = 0; v < whole; v++)
                transpose(tiles[v] + first, from + v * LANES * channel_stride + first, channel_stride);
#endif
    for (int channel = 0; channel < width; channel++)
        for (int t = channel < whole * LANES ? first : 0; t < steps; t++)
            tiles[channel / LANES][t][channel % LANES] = from[channel * channel_stride + t * step_stride];
}

/* The other way: `width` channels to rows of neighbouring channels. */
static void store(float *to, int64_t step_stride, const tile *tiles, int width, int steps)
{
    const int whole = width / LANES, left = width % LANES;
    for (int t = 0; t < steps; t++, to += step_stride) {
        for (int v = 0; v < whole; v++)
            *(loose_vec *)(to + v * LANES) = tiles[v][t];
        if (left)
            memcpy(to + whole * LANES, &tiles[whole][t], 4 * left);
    }
}

/* All steps of a block for one vector of channels. `sums` is a constant wherever this is inlined. */
static inline __attribute__((always_inline)) void recur(
    const struct call *call, struct room *room, int64_t sequence, int vector, int64_t start, int steps, const int sums)
{
    const int64_t states = call->states, B_step = call->B_strides[2], C_step = call->C_strides[2];
    const vec *rates = room->rates + vector * states;
    const vec *delta = room->delta[vector];
    vec *y = room->y[vector], *state = room->state + (sequence * PANEL + vector) * states;
    for (int64_t n = 0; n < states; n++) {
        const float *B = call->B + sequence * call->B_strides[0] + n * call->B_strides[1] + start * B_step;
        const float *C = call->C + sequence * call->C_strides[0] + n * call->C_strides[1] + start * C_step;
        const vec rate = rates[n];
        vec h = state[n], lost = splat(0.0f), energy = splat(0.0f), squares = splat(0.0f);
        for (int t = 0; t < steps; t++) {
            const int64_t at = ((t * states + n) * PANEL + vector) * LANES;
            const vec decay = exponential(delta[t] * rate), carried = decay * h, c = splat(C[t * C_step]);
            if (sums & STATE_PREV_TOTAL)
                squares = fma(h, h, squares);
            if (sums & STATE_PREV)
                *(vec *)(room->prev_buffer + at) += h * h;
            if (sums & DECAY_SUM)
                *(vec *)(room->decay_buffer + at) += decay;
            h = fma(room->drive[t], splat(B[t * B_step]), carried);
            y[t] = fma(h, c, y[t]);
            if (sums & DECAY_ERROR)
                lost = fma(carried * c, carried * c, lost);
            if (sums & STATE_ENERGY)
                energy = fma(h * c, h * c, energy);
        }
        state[n] = h;
        const int64_t total = (vector * states + n) * LANES;
        for (int lane = 0; lane < LANES; lane++) {
            if (sums & DECAY_ERROR)
                room->decay_error[total + lane] += lost[lane];
            if (sums & STATE_ENERGY)
                room->state_energy[total + lane] += energy[lane];
            if (sums & STATE_PREV_TOTAL)
                room->state_prev[total + lane] += squares[lane];
        }
    }
}

/* y of a block for `width` channels. */
static void block(const struct call *call, struct room *room, int64_t sequence, int64_t channel, int width, int64_t start,
                  int steps, int sums)
{
    const int64_t *xs = call->x_strides, *ds = call->dt_strides, *zs = call->z_strides;
    load(room->x, call->x + sequence * xs[0] + channel * xs[1] + start * xs[2], xs[1], xs[2], width, steps);
    load(room->delta, call->dt + sequence * ds[0] + channel * ds[1] + start * ds[2], ds[1], ds[2], width, steps);
    if (call->z)
        load(room->z, call->z + sequence * zs[0] + channel * zs[1] + start * zs[2], zs[1], zs[2], width, steps);
    for (int v = 0; v * LANES < width; v++) {
        const int lanes = width - v * LANES < LANES ? width - v * LANES : LANES;
        vec *delta = room->delta[v], *y = room->y[v], *z = room->z[v];
        vec bias = splat(0.0f), skip = splat(0.0f), squares = splat(0.0f);
        if (call->delta_bias)
            memcpy(&bias, call->delta_bias + channel + v * LANES, 4 * lanes);
        if (call->D)
            memcpy(&skip, call->D + channel + v * LANES, 4 * lanes);
        for (int t = 0; t < steps; t++) {
            const vec x = room->x[v][t], before = delta[t] + bias;
            delta[t] = call->softplus ? softplus(before) : before;
            room->drive[t] = delta[t] * x;
            y[t] = call->D ? x * skip : splat(0.0f);
        }
        if (sums == 0)
            recur(call, room, sequence, v, start, steps, 0);
        else if (sums == DECAY_ERROR)
            recur(call, room, sequence, v, start, steps, DECAY_ERROR);
        else if (sums == (STATE_PREV | DECAY_SUM))
            recur(call, room, sequence, v, start, steps, STATE_PREV | DECAY_SUM);
        else
            recur(call, room, sequence, v, start, steps, sums);
        if (!call->z)
            continue;
        for (int t = 0; t < steps; t++) {
            const vec gate = silu(z[t]);
            y[t] *= gate;
            squares = fma(gate, gate, squares);
        }
        for (int lane = 0; lane < LANES; lane++)
            room->gate[v * LANES + lane] += squares[lane];
    }
    store(call->y + (sequence * call->length + start) * call->channels + channel, call->channels, room->y, width, steps);
}

/* Adds a buffer of one block to the caller's [L, I, N] tensor and clears it. */
static void flush(float *buffer, void *to, const int64_t *strides, int64_t is_double, int64_t states, int64_t channel,
                  int64_t width, int64_t start, int steps)
{
    for (int t = 0; t < steps; t++)
        for (int64_t n = 0; n < states; n++, buffer += PANEL * LANES) {
            const int64_t first = (start + t) * strides[0] + channel * strides[1] + n * strides[2];
            float *single = (float *)to + first;
            double *wide = (double *)to + first;
            if (is_double)
                for (int64_t c = 0; c < width; c++)
                    wide[c * strides[1]] += buffer[c];
            else if (strides[1] == 1)
                for (int64_t c = 0; c < width; c++)
                    single[c] += buffer[c];
            else
                for (int64_t c = 0; c < width; c++)
                    single[c * strides[1]] += buffer[c];
            memset(buffer, 0, sizeof(float) * PANEL * LANES);
        }
}

/* `sums` [panel, N, LANES] to `to` [N, I]. */
static void keep(const double *sums, double *to, const struct call *call, int64_t states, int64_t channel, int64_t width)
{
    for (int64_t c = 0; to && c < width; c++)
        for (int64_t n = 0; n < states; n++)
            to[n * call->channels + channel + c] = sums[(c / LANES * states + n) * LANES + c % LANES];
}

static int block_steps(const struct call *call)
{
    if (!call->states || (!call->state_prev && !call->decay_sum))
        return MOST_STEPS;
    const int64_t buffered = 256 / call->states; /* both buffers stay in the second-level cache */
    return buffered < 4 ? 4 : buffered > MOST_STEPS / 2 ? MOST_STEPS / 2 : (int)buffered;
}

/* All sequences and steps of `width` channels from `channel` on. `room` is all zeros but for what a panel left in it. */
static void panel(const struct call *call, struct room *room, int64_t channel, int64_t width)
{
    const int64_t states = call->states;
    const int most = block_steps(call);
    const int sums = (call->decay_error ? DECAY_ERROR : 0) | (call->state_energy ? STATE_ENERGY : 0) |
                     (call->state_prev_total ? STATE_PREV_TOTAL : 0) | (call->state_prev ? STATE_PREV : 0) |
                     (call->decay_sum ? DECAY_SUM : 0);
    memset(room->state, 0, sizeof(vec) * call->batch * PANEL * states);
    memset(room->rates, 0, sizeof(vec) * PANEL * states);
    memset(room->decay_error, 0, sizeof(double) * PANEL * LANES * (3 * states + 1)); /* and what lies behind it */
    for (int64_t c = 0; c < width; c++)
        for (int64_t n = 0; n < states; n++)
            ((float *)room->rates)[(c / LANES * states + n) * LANES + c % LANES] = call->A[(channel + c) * states + n];
    for (int64_t start = 0; start < call->length; start += most) {
        const int steps = call->length - start < most ? (int)(call->length - start) : most;
        for (int64_t sequence = 0; sequence < call->batch; sequence++)
            block(call, room, sequence, channel, (int)width, start, steps, sums);
        if (call->state_prev)
            flush(room->prev_buffer, call->state_prev, call->state_prev_strides, call->state_prev_is_double, states,
                  channel, width, start, steps);
        if (call->decay_sum)
            flush(room->decay_buffer, call->decay_sum, call->decay_sum_strides, call->decay_sum_is_double, states,
                  channel, width, start, steps);
    }
    keep(room->decay_error, call->decay_error, call, states, channel, width);
    keep(room->state_energy, call->state_energy, call, states, channel, width);
    keep(room->state_prev, call->state_prev_total, call, states, channel, width);
    keep(room->gate, call->gate_energy, call, 1, channel, width);
    for (int64_t sequence = 0; sequence < call->batch; sequence++)
        for (int64_t c = 0; c < width; c++)
            for (int64_t n = 0; n < states; n++)
                call->last_state[(sequence * states + n) * call->channels + channel + c] =
                    ((float *)room->state)[((sequence * PANEL + c / LANES) * states + n) * LANES + c % LANES];
}

/* One allocation for all of a thread's room; NULL where there is no memory. */
static struct room *make_room(const struct call *call)
{
    const size_t vectors = (size_t)PANEL * call->states, buffer = block_steps(call) * vectors * sizeof(vec);
    const size_t state = call->batch * vectors * sizeof(vec), totals = (3 * vectors + PANEL) * LANES * sizeof(double);
    const size_t bytes = sizeof(struct room) + state + vectors * sizeof(vec) + totals +
                         (call->state_prev ? buffer : 0) + (call->decay_sum ? buffer : 0);
    void *memory;
    if (posix_memalign(&memory, sizeof(vec), bytes))
        return NULL;
    memset(memory, 0, bytes);
    struct room *room = memory;
    char *next = (char *)(room + 1);
    room->state = (vec *)next;
    room->rates = (vec *)(next += state);
    room->decay_error = (double *)(next += vectors * sizeof(vec));
    room->state_energy = room->decay_error + vectors * LANES;
    room->state_prev = room->state_energy + vectors * LANES;
    room->gate = room->state_prev + vectors * LANES;
    room->prev_buffer = (float *)(next += totals);
    room->decay_buffer = (float *)(next + (call->state_prev ? buffer : 0));
    return room;
}

static void work(void *argument)
{
    struct job *job = argument;
    const struct call *call = job->call;
    const int64_t most = job->panel * LANES;
    int64_t channel = take(&job->next) * most;
    if (channel >= call->channels)
        return;
    struct room *room = make_room(call);
    if (!room) { /* the panel stays undone: the call has failed */
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
#if defined(__SSE2__)
    /* Numbers below the smallest normal one are 0: squares of fast-decaying terms would take a hundred times longer. */
    const unsigned int mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
#endif
    for (; channel < call->channels; channel = take(&job->next) * most) {
        const int64_t left = call->channels - channel;
        panel(call, room, channel, left < most ? left : most);
    }
#if defined(__SSE2__)
    _mm_setcsr(mode);
#endif
    free(room);
}

/* 0, or 1 where there is no memory; what was to be written is then undefined. */
int optimum_ssm_selective_scan(const struct call *call)
{
    const int64_t vectors = (call->channels + LANES - 1) / LANES;
    const int64_t worth = call->batch * call->channels * call->states * call->length / WORK_OF_A_THREAD;
    const int64_t threads = team(worth < vectors ? worth : vectors, call->threads);
    const int64_t busy = threads > vectors ? vectors : threads;
    const int64_t panel = vectors / (2 * busy) < 1 ? 1 : vectors / (2 * busy);
    struct job job = {call, panel > PANEL ? PANEL : panel, 0, 0};
    in_threads(work, &job, threads);
    return (int)job.failed;
}
