/* Copyright 2026 The optimum_ssm authors. All rights reserved.
 * SPDX-License-Identifier: Apache-2.0
 *
 * Vectors of float32 and threads, for the C files beside this one. Vectors are those of GCC and Clang, as long as one
 * register of the processor that is compiled for. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* `larger` and `smaller` give their second argument where either is NaN. `fma` says where a product is not rounded: left to
 * the compiler (-ffp-contract=off forbids it), y would depend on the sums that are asked for. */
#if defined(__AVX512F__)
#define LANES 16
#define larger(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define smaller(a, b) ((vec)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define fma(a, b, c) ((vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define LANES 8
#define larger(a, b) ((vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define smaller(a, b) ((vec)_mm256_min_ps((__m256)(a), (__m256)(b)))
#if defined(__FMA__)
#define fma(a, b, c) ((vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#endif
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LANES 4
#define larger(a, b) pick((a) > (b), a, b)
#define smaller(a, b) pick((a) < (b), a, b)
#if defined(__aarch64__)
#define fma(a, b, c) ((vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#endif
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#endif
#if !defined(fma)
#define fma(a, b, c) ((a) * (b) + (c))
#endif
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLES
#endif
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* anywhere in memory */
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

static inline vec splat(float value) { return value - (vec){0}; }

static inline vec pick(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* exp to about 1 ulp: 2^n exp(r) with |r| <= log(2) / 2. Below the smallest normal number it is 0, from exp(88.4) on inf,
 * NaN stays NaN. n is rounded by adding 1.5 * 2^23 + 127, after which the low bits of the sum are the exponent of 2^n. */
static inline vec exponential(vec x)
{
    x = smaller(splat(88.9f), larger(splat(-88.1f), x)); /* n = -127, whose power has the bits of 0, and 128, those of inf */
    const vec shifted = fma(x, splat(1.44269504f), splat(12583039.0f)), n = shifted - splat(12583039.0f);
    const vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    vec p = fma(r, splat(1.3981999507e-3f), splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    return p * (vec)((ivec)shifted << 23);
}

/* v times the logistic function of v. */
static inline vec silu(vec v) { return v / (exponential(-v) + 1.0f); }

/* The number of a piece of work that nobody took yet; whoever computes asks until there is none. */
static inline int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

/* The threads to ask for: all that torch has where the work is worth more than one. OpenMP ends those that a smaller team
 * leaves over, and torch would have to start them again. */
static inline int64_t team(int64_t worth, int64_t threads) { return worth > 1 ? threads : 1; }

/* `work(job)` in this thread and up to `threads` - 1 more. It takes what is left to do from `job` until nothing is: where
 * no further thread can start, those that run do it all. */
__attribute__((visibility("hidden"))) void in_threads(void (*work)(void *), void *job, int64_t threads);
