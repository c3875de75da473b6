/* Put in front of the core's files to measure what its counters cost: they are all there, and nobody counts. */
#define _GNU_SOURCE /* as some of them do themselves, before anything else */
#include "counting.h"

#define count(counter, amount) ((void)(counter), (void)(amount))
#define count_burst(bursts, frames) ((void)(bursts), (void)(frames))
