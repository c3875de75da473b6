/* How long the pump polls follows how long it had nothing to do. */
#include "check.h"
#include "polling.h"

static const uint64_t MOST = 160000, LEAST = 10000;

TEST(polling_is_never_begun_if_it_is_not_wanted)
{
    struct polling polling = polling_start(0);
    for (uint64_t idle = 0; idle < 1000000; idle += 1000)
        polling_learn(&polling, idle);
    CHECK_EQ(polling.now_ns, 0);
}

TEST(polling_that_pays_off_stays_as_it_is)
{
    struct polling polling = polling_start(MOST);
    for (uint64_t idle = 0; idle <= MOST; idle += 1000)
        polling_learn(&polling, idle);
    CHECK_EQ(polling.now_ns, MOST);
}

/* After a few long silences it sleeps at once; nothing shorter than the shortest poll is tried. */
TEST(polling_in_vain_is_given_up)
{
    struct polling polling = polling_start(MOST);
    uint64_t before = MOST;
    for (int i = 0; i < 4; i++) {
        polling_learn(&polling, MOST + 1);
        CHECK_EQ(polling.now_ns, before / 2);
        before /= 2;
    }
    CHECK_EQ(polling.now_ns, LEAST);
    polling_learn(&polling, MOST + 1);
    CHECK_EQ(polling.now_ns, 0);
}

/* A sleep so short that polling would have seen its end: it is tried again, longer each time, up to what is allowed. */
TEST(polling_begins_again_when_sleeps_are_short)
{
    struct polling polling = {.most_ns = MOST};
    uint64_t expected[] = {LEAST, 2 * LEAST, 4 * LEAST, 8 * LEAST, MOST, MOST};
    for (int i = 0; i < 6; i++) {
        polling_learn(&polling, MOST);
        CHECK_EQ(polling.now_ns, expected[i]);
    }
}
