/* The histogram of latencies: fixed buckets of a quarter power of two, so adding is a shift and two stores. */
#include "counting.h"

enum { HISTOGRAM_BUCKETS = 160 };

void nb_histogram_add(struct nb_histogram *histogram, uint64_t nanoseconds)
{
    uint64_t bucket = nanoseconds;
    if (nanoseconds >= 4) {
        unsigned power = floor_log2(nanoseconds);
        bucket = 4 * power + ((nanoseconds >> (power - 2)) & 3);
    }
    if (bucket >= HISTOGRAM_BUCKETS)
        bucket = HISTOGRAM_BUCKETS - 1;
    count(&histogram->buckets[bucket], 1);
    count(&histogram->sum_ns, nanoseconds);
    if (nanoseconds > histogram->max_ns)
        store_once_64(&histogram->max_ns, nanoseconds);
    count(&histogram->count, 1);
}
