/* Copyright 2026 The optimum_ssm authors. All rights reserved.
 * SPDX-License-Identifier: Apache-2.0
 *
 * The column sweep of the optimal brain surgeon over one block of columns, for a CPU: what `native_column_sweep.py` calls.
 *
 * A vector holds LANES rows, which do not see each other. Their block is turned once, to a tile of [columns, LANES] that
 * stays in the first-level cache; every column then subtracts its error times one row of U from the columns on its right.
 * Products are rounded before they are subtracted, as torch rounds them: both give the same bits. */

#include "vectors.h"

/* Rows times columns times columns that are worth a thread, about 0.1 ms of work. */
#define WORK_OF_A_THREAD 2000000

/* The fields of `Sweep` in native_column_sweep.py, in its order: 8 bytes each. Strides count elements. */
struct sweep {
    float *block;                /* [R, C], read and written */
    const float *factor;         /* [C, C], contiguous, upper triangular */
    const uint8_t *dead;         /* [C], contiguous */
    uint8_t *chosen;             /* [R, C], read, or written with N:M */
    float *errors;               /* [C, R], contiguous, written */
    int64_t rows, columns, group, removed; /* of every `group` columns the `removed` lowest; 0: as `chosen` says */
    int64_t block_row, block_column, chosen_row, chosen_column, threads;
};

struct job {
    const struct sweep *sweep;
    int64_t next, failed; /* the first vector of rows that nobody took, whether memory ran out */
};

/* gone[0..group) = 0 or ~0: the lowest squared errors (w / U_jj)^2, of equal ones the first; 0 where the input is dead. */
static void choose(const struct sweep *s, int64_t first, const vec *weight, ivec *gone, vec *scores)
{
    for (int64_t k = 0; k < s->group; k++) {
        const vec ratio = weight[k] / splat(s->factor[(first + k) * (s->columns + 1)]);
        scores[k] = s->dead[first + k] ? splat(0.0f) : ratio * ratio;
    }
    for (int64_t k = 0; k < s->group; k++) {
        ivec rank = {0}; /* minus the number of entries that go before */
        for (int64_t other = 0; other < s->group; other++)
            rank += other < k ? scores[other] <= scores[k] : scores[other] < scores[k];
        gone[k] = -rank < (int32_t)s->removed;
    }
}

/* Up to LANES rows. `tile`, `gone` have room for all columns, `scores` for a group. */
static void sweep_rows(const struct sweep *s, int64_t row, int width, vec *tile, ivec *gone, vec *scores)
{
    for (int64_t j = 0; j < s->columns; j++)
        tile[j] = splat(0.0f), gone[j] = (ivec){0};
    for (int lane = 0; lane < width; lane++) {
        const float *from = s->block + (row + lane) * s->block_row;
        const uint8_t *mask = s->chosen + (row + lane) * s->chosen_row;
        for (int64_t j = 0; j < s->columns; j++) {
            ((float *)(tile + j))[lane] = from[j * s->block_column];
            ((int32_t *)(gone + j))[lane] = mask[j * s->chosen_column] ? -1 : 0;
        }
    }
    for (int64_t j = 0; j < s->columns; j++) {
        if (s->group && j % s->group == 0)
            choose(s, j, tile + j, gone + j, scores);
        const float *line = s->factor + j * s->columns;
        const vec error = pick(gone[j], tile[j], splat(0.0f)) / splat(line[j]);
        for (int64_t k = j + 1; k < s->columns; k++)
            tile[k] -= error * splat(line[k]);
        memcpy(s->errors + j * s->rows + row, &error, 4 * width);
    }
    for (int lane = 0; lane < width; lane++) {
        float *to = s->block + (row + lane) * s->block_row;
        uint8_t *mask = s->chosen + (row + lane) * s->chosen_row;
        for (int64_t j = 0; j < s->columns; j++) {
            const int32_t is_gone = ((int32_t *)(gone + j))[lane];
            to[j * s->block_column] = is_gone ? 0.0f : ((float *)(tile + j))[lane];
            if (s->group)
                mask[j * s->chosen_column] = is_gone != 0;
        }
    }
}

static void work(void *argument)
{
    struct job *job = argument;
    const struct sweep *s = job->sweep;
    int64_t row = take(&job->next) * LANES;
    if (row >= s->rows)
        return;
    void *memory;
    if (posix_memalign(&memory, sizeof(vec), (2 * s->columns + s->group) * sizeof(vec))) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    vec *tile = memory;
    for (; row < s->rows; row = take(&job->next) * LANES) {
        const int64_t left = s->rows - row;
        sweep_rows(s, row, left < LANES ? (int)left : LANES, tile, (ivec *)(tile + s->columns), tile + 2 * s->columns);
    }
    free(memory);
}

/* 0, or 1 where there is no memory; what was to be written is then undefined. */
int optimum_ssm_column_sweep(const struct sweep *sweep)
{
    struct job job = {sweep, 0, 0};
    const int64_t worth = sweep->rows * sweep->columns * sweep->columns / WORK_OF_A_THREAD;
    in_threads(work, &job, team(worth, sweep->threads));
    return (int)job.failed;
}
