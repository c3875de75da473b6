/* Counting into the page that outsiders read: one writer, so no locked instruction is needed, only whole stores. */
#ifndef NB_COUNTING_H
#define NB_COUNTING_H

#include <stdint.h>
#include <time.h>

#include "core.h"
#include "barriers.h"

static inline void count(uint64_t *counter, uint64_t amount) { store_once_64(counter, *counter + amount); }

static inline unsigned floor_log2(uint64_t value) { return 63u - (unsigned)__builtin_clzll(value | 1); }

static inline void count_burst(uint64_t bursts[12], uint32_t frames)
{
    unsigned bucket = floor_log2(frames);
    count(&bursts[bucket < 12 ? bucket : 11], 1);
}

/* CLOCK_MONOTONIC in nanoseconds. */
static inline uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif
