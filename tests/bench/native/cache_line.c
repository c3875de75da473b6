/* One-way time of a cache line between two processors: two threads pass a number back and forth for some milliseconds.
 *
 *     cache_line [CPU_A CPU_B [ROUND_TRIPS]]
 *
 * Prints nanoseconds, the best of several runs: an interruption makes one longer, nothing makes one shorter.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { RUNS = 5 };

static _Alignas(128) atomic_uint ball;
static unsigned round_trips = 20000;

static void pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof(set), &set))
        perror("cache_line: sched_setaffinity"), exit(1);
}

static void *return_balls(void *cpu)
{
    pin(*(int *)cpu);
    for (unsigned i = 0; i < round_trips * RUNS; i++) {
        while (atomic_load_explicit(&ball, memory_order_acquire) != 2 * i + 1)
            ;
        atomic_store_explicit(&ball, 2 * i + 2, memory_order_release);
    }
    return NULL;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

int main(int argc, char **argv)
{
    int a = argc > 2 ? atoi(argv[1]) : 0, b = argc > 2 ? atoi(argv[2]) : 1;
    if (argc > 3)
        round_trips = (unsigned)atoi(argv[3]);
    pthread_t other;
    if (pthread_create(&other, NULL, return_balls, &b))
        return perror("cache_line: pthread_create"), 1;
    pin(a);
    double best = 1e18;
    for (unsigned run = 0, i = 0; run < RUNS; run++) {
        uint64_t began = now_ns();
        for (unsigned end = i + round_trips; i < end; i++) {
            atomic_store_explicit(&ball, 2 * i + 1, memory_order_release);
            while (atomic_load_explicit(&ball, memory_order_acquire) != 2 * i + 2)
                ;
        }
        double one_way = (double)(now_ns() - began) / (2.0 * round_trips);
        best = one_way < best ? one_way : best;
    }
    pthread_join(other, NULL);
    printf("%.1f\n", best);
    return 0;
}
