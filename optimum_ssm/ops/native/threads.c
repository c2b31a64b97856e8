/* Copyright 2026 The optimum_ssm authors. All rights reserved.
 * SPDX-License-Identifier: Apache-2.0
 *
 * Threads for one call: those of the OpenMP that torch runs on, or new ones where it has none.
 *
 * After each of its own operations torch leaves its threads waiting for the next one, for a while at full speed. Further
 * threads would share the cores with these; so they are asked to do this work as well. */

#include <pthread.h>

#include "vectors.h"

#define MOST_THREADS 256

/* `GOMP_parallel` of libgomp, which other OpenMP libraries have too: `work(job)` in `threads` threads, this one among
 * them. */
typedef void parallel(void (*work)(void *), void *job, unsigned int threads, unsigned int flags);

static parallel *openmp; /* NULL: no OpenMP */

/* Also with NULL: after a fork none of OpenMP's threads is left, and it would wait for them. */
void optimum_ssm_use_openmp(void *function) { openmp = (parallel *)function; }

struct start {
    void (*work)(void *);
    void *job;
};

static void *run(void *argument)
{
    const struct start *start = argument;
    start->work(start->job);
    return NULL;
}

void in_threads(void (*work)(void *), void *job, int64_t threads)
{
    if (openmp && threads > 1) {
        openmp(work, job, (unsigned int)threads, 0);
        return;
    }
    pthread_t others[MOST_THREADS];
    struct start start = {work, job};
    int64_t started = 0;
    while (started < threads - 1 && started < MOST_THREADS && !pthread_create(&others[started], NULL, run, &start))
        started++;
    work(job);
    while (started)
        pthread_join(others[--started], NULL);
}
