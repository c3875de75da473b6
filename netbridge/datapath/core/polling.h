/* How long to poll before sleeping, learnt from how long there was nothing to do lately.
 *
 * A sleep costs the doorbell's system call on the other side, and the way back to the processor on this one: more than the
 * frame itself. Polling saves that if the next frame comes soon, and burns the processor for nothing if it does not. So
 * every idle time is looked at afterwards, as Linux does for halted virtual processors (halt polling): one that ended while
 * we polled was polled for rightly; one that ended a little later would have been worth a longer poll; one that was longer
 * than any poll we may make means that the traffic is not of the kind that polling helps.
 */
#ifndef NB_POLLING_H
#define NB_POLLING_H

#include <stdint.h>

struct polling {
    uint64_t most_ns; /* 0: never poll */
    uint64_t now_ns;  /* how long to poll at present */
};

enum { POLLING_STEPS = 16 }; /* the shortest poll is this fraction of the longest */

static inline struct polling polling_start(uint64_t most_ns)
{
    /* Whoever asks for polling expects traffic; if it does not come that is known after a few sleeps. */
    return (struct polling){.most_ns = most_ns, .now_ns = most_ns};
}

/* There was nothing to do for `idle_ns`, polling and sleeping together. */
static inline void polling_learn(struct polling *polling, uint64_t idle_ns)
{
    if (idle_ns <= polling->now_ns)
        return;
    uint64_t least = polling->most_ns / POLLING_STEPS;
    if (idle_ns > polling->most_ns)
        polling->now_ns = polling->now_ns / 2 < least ? 0 : polling->now_ns / 2;
    else if (polling->now_ns == 0)
        polling->now_ns = least;
    else
        polling->now_ns = polling->now_ns * 2 < polling->most_ns ? polling->now_ns * 2 : polling->most_ns;
}

#endif
