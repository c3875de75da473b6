/* A device that lies in the middle of full traffic: the pump comes back by itself with the fault that names it. */
#include "check.h"
#include "traffic.h"
#include "world.h"

static void expect_lie_under_load(enum fake_lie lie, enum nb_device_fault fault)
{
    struct world world;
    struct traffic traffic;
    struct echo echo;
    world_open(&world, (struct world_config){.max_pieces = 4});
    if (world.config.ring.packed && lie == FAKE_INDEX_JUMP)
        lie = FAKE_ID_OUT_OF_RANGE, fault = NB_FAULT_USED_ID; /* there is no index */
    world_start_pump(&world);
    echo_start(&echo, &world);
    traffic_start(&traffic, &world, (struct traffic_config){.frames = 3000, .window = 60, .burst = 8, .scrambled = true,
                                                           .lie = lie, .lie_at = 1000});
    traffic_finish(&traffic);
    CHECK_EQ(pthread_join(world.pump_thread, NULL), 0);
    CHECK_EQ(world.result.event, NB_EVENT_DEVICE_FAULT);
    CHECK_EQ(world.result.detail, fault);
    CHECK_EQ(world.counters.device_faults[fault], 1);
    CHECK(world.counters.packets_rx >= 940); /* all but those that were on their way */
    echo_stop(&echo);
    world_close(&world);
}

TEST(used_id_out_of_range_under_load) { expect_lie_under_load(FAKE_ID_OUT_OF_RANGE, NB_FAULT_USED_ID); }
TEST(used_id_twice_under_load) { expect_lie_under_load(FAKE_ID_TWICE, NB_FAULT_USED_ID); }
TEST(used_length_too_long_under_load) { expect_lie_under_load(FAKE_LENGTH_TOO_LONG, NB_FAULT_USED_LENGTH); }
TEST(used_length_too_short_under_load) { expect_lie_under_load(FAKE_LENGTH_TOO_SHORT, NB_FAULT_USED_LENGTH); }
TEST(num_buffers_zero_under_load) { expect_lie_under_load(FAKE_NUM_BUFFERS_ZERO, NB_FAULT_NUM_BUFFERS); }
TEST(num_buffers_too_many_under_load) { expect_lie_under_load(FAKE_NUM_BUFFERS_TOO_MANY, NB_FAULT_NUM_BUFFERS); }
TEST(used_index_jump_under_load) { expect_lie_under_load(FAKE_INDEX_JUMP, NB_FAULT_USED_JUMP); }
