/* What a device can lie about with a split ring alone: its used index, and ids of 32 bits. */
#include "check.h"
#include "world.h"

static const struct world_config FEW_BUFFERS = {.rx_count = 32}; /* in a queue of 64: some descriptors are free */

TEST(used_id_of_more_than_16_bits)
{
    /* 0x10000: out of range, and 0 to whoever cuts it to 16 bits. */
    const uint32_t ids[] = {0x10000, 0x80000000, 0xffffffff};
    for (unsigned i = 0; i < sizeof(ids) / sizeof(ids[0]); i++) {
        struct world world;
        world_open(&world, (struct world_config){0});
        fake_push(&world.device.rx, ids[i], 100);
        fake_publish(&world.device.rx);
        world_expect_device_fault(&world, NB_FAULT_USED_ID);
        world_close(&world);
    }
}

/* used index jumping by more than is outstanding */
TEST(used_index_jumps)
{
    const uint16_t ahead[] = {33, 64, 65, 32768, 65535};
    for (unsigned i = 0; i < sizeof(ahead) / sizeof(ahead[0]); i++) {
        struct world world;
        world_open(&world, FEW_BUFFERS); /* 32 in flight */
        fake_set_used_index(&world.device.rx, ahead[i]);
        world_expect_device_fault(&world, NB_FAULT_USED_JUMP);
        CHECK_EQ(world.client.rx_active.header->produced, 0);
        world_close(&world);
    }
}

TEST(used_index_moves_with_nothing_in_flight)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    fake_set_used_index(&world.device.tx, 1);
    world_expect_device_fault(&world, NB_FAULT_USED_JUMP);
    world_close(&world);
}

TEST(used_index_goes_back)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    deliver(&world, 0, 100);
    world_pump_idle(&world);
    world.device.lie = FAKE_INDEX_BACK;
    deliver(&world, 1, 200);
    world_expect_device_fault(&world, NB_FAULT_USED_JUMP);
    CHECK_EQ(world.counters.packets_rx, 1);
    world_close(&world);
}

/* Within what is in flight, but nothing was written: the stale elements name one buffer again and again. */
TEST(used_index_runs_ahead_of_its_elements)
{
    struct world world;
    world_open(&world, FEW_BUFFERS);
    fake_set_used_index(&world.device.rx, 32);
    world_expect_device_fault(&world, NB_FAULT_USED_LENGTH); /* the first says id 0, length 0 */
    world_close(&world);
}

/* IN_ORDER: an element stands for all chains up to the one it names, which the index must announce as well. */
TEST(in_order_batch_that_is_not_announced)
{
    struct world world;
    world_open(&world, (struct world_config){.ring.in_order = true});
    fake_push(&world.device.rx, 2, HEADER + 60);
    fake_publish(&world.device.rx);
    world_expect_device_fault(&world, NB_FAULT_USED_ID);
    CHECK_EQ(world.counters.packets_rx, 0);
    world_close(&world);
}
