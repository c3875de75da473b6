/* Where there is one processor a client gives nothing back as long as the pump runs: so it is waited for, not punished. */
#include "check.h"
#include "world.h"

#include <sched.h>

enum { LIMIT = 8, FRAMES = 20, LENGTH = 60 };

static const struct world_config ONE_PROCESSOR = {.yields = true, .client_limit = LIMIT};

static void deliver_all(struct world *world)
{
    for (uint64_t i = 0; i < FRAMES; i++)
        deliver(world, i, LENGTH);
}

TEST(a_client_that_did_not_run_loses_no_frame)
{
    struct world world;
    world_open(&world, ONE_PROCESSOR);
    deliver_all(&world);
    for (uint64_t next = 0; next < FRAMES;) {
        struct nb_piece pieces[FRAMES];
        world_pump_idle(&world);
        int count = nb_client_receive(&world.client, pieces, FRAMES);
        CHECK(count > 0 && count <= LIMIT);
        for (int i = 0; i < count; i++)
            CHECK(frame_is(pieces[i].data, next++, LENGTH, false));
        nb_client_release(&world.client, pieces, (uint32_t)count);
    }
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], 0);
    CHECK_EQ(world.counters.packets_rx, FRAMES);
    world_close(&world);
}

/* What it sends goes on its way meanwhile. */
TEST(a_client_that_is_waited_for_can_send)
{
    struct world world;
    world_open(&world, ONE_PROCESSOR);
    deliver_all(&world);
    world_pump_idle(&world);
    send_one(&world, 0, LENGTH);
    world_pump_idle(&world);
    transmit_one(&world, 0, LENGTH);
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_tx, 1);
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], 0);
    world_close(&world);
}

static void pump_until_dropped(struct world *world, uint64_t frames)
{
    double deadline = seconds_now() + 30;
    world_start_pump(world);
    while (*(volatile uint64_t *)&world->counters.drops[NB_DROP_CLIENT_SLOW] != frames) {
        CHECK(seconds_now() < deadline);
        sched_yield();
    }
    world_stop_pump(world);
}

/* And every one of them is counted; after that nobody waits for it, until it has given something back. */
TEST(a_client_that_gives_nothing_back_costs_its_frames)
{
    struct world world;
    struct nb_piece pieces[FRAMES];
    world_open(&world, ONE_PROCESSOR);
    deliver_all(&world);
    double begin = seconds_now();
    pump_until_dropped(&world, FRAMES - LIMIT);
    CHECK(seconds_now() > begin + 0.05);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), LIMIT);

    deliver(&world, FRAMES, LENGTH);
    world_pump_idle(&world);
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], FRAMES - LIMIT + 1);

    CHECK_EQ(nb_client_receive(&world.client, pieces, FRAMES), LIMIT);
    nb_client_release(&world.client, pieces, LIMIT);
    deliver_all(&world);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_receive(&world.client, pieces, FRAMES), LIMIT);
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], FRAMES - LIMIT + 1);
    world_close(&world);
}

/* What it forwards it has given back, whether its buffer is free at once, for it was copied, or when the device has
 * sent it. */
TEST(a_client_that_forwards_is_waited_for_again)
{
    for (uint32_t copied = 0; copied <= LENGTH; copied += LENGTH) {
        struct world world;
        struct nb_piece pieces[FRAMES];
        struct world_config config = ONE_PROCESSOR;
        config.tx_copied = copied;
        world_open(&world, config);
        deliver_all(&world);
        pump_until_dropped(&world, FRAMES - LIMIT);
        CHECK_EQ(nb_client_receive(&world.client, pieces, FRAMES), LIMIT);
        nb_client_forward(&world.client, pieces, LIMIT);
        world_pump_idle(&world);
        deliver_all(&world);
        world_pump_idle(&world);
        CHECK_EQ(nb_client_receive(&world.client, pieces, FRAMES), copied ? LIMIT : 0);
        CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], FRAMES - LIMIT);
        world_close(&world);
    }
}

/* It can do nothing about a device that sends nothing; when it does, all is as before. */
TEST(a_device_that_was_slow_to_send_costs_no_more_frames)
{
    struct world world;
    struct nb_piece pieces[FRAMES];
    world_open(&world, ONE_PROCESSOR);
    for (uint64_t i = 0; i < LIMIT; i++)
        forward_on(&world, obtain(&world, i, LENGTH), 0);
    deliver_all(&world);
    pump_until_dropped(&world, FRAMES);
    for (uint64_t i = 0; i < LIMIT; i++)
        transmit_one(&world, i, LENGTH);
    world_pump_idle(&world);
    deliver_all(&world);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_receive(&world.client, pieces, FRAMES), LIMIT);
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], FRAMES);
    world_close(&world);
}
