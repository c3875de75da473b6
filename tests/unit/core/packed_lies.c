/* What a device can lie about with a packed ring alone: whose turn a descriptor says it is, and where it writes. */
#include "check.h"
#include "white_box.h"
#include "world.h"

#include <string.h>

static const struct fake_features PACKED = {.packed = true};

enum { AVAILABLE = 0x80, USED = 0x8000 };

/* A used descriptor at any offset of the RX ring, as a device that follows no rules writes it. */
static void forge_used(struct world *world, uint32_t offset, uint16_t id, uint32_t len, uint16_t flags)
{
    uint8_t *descriptor = world->rx_memory.device + world->rx_layout.desc + (size_t)16 * offset;
    memcpy(descriptor + 8, &len, 4);
    memcpy(descriptor + 12, &id, 2);
    memcpy(descriptor + 14, &flags, 2);
}

static void expect_nothing_received(struct world *world)
{
    struct nb_piece piece;
    world_pump_idle(world);
    CHECK_EQ(nb_client_receive(&world->client, &piece, 1), 0);
    CHECK_EQ(world->counters.packets_rx, 0);
}

/* Both bits alike, but those of the other lap: that is how a descriptor looks that was used one lap ago. */
TEST(wrap_bit_flipped)
{
    struct world world;
    world_open(&world, (struct world_config){.ring = PACKED});
    forge_used(&world, 0, 0, HEADER + 60, 0);
    expect_nothing_received(&world);
    forge_used(&world, 0, 0, HEADER + 60, AVAILABLE | USED);
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_rx, 1);
    world_close(&world);
}

TEST(only_one_of_the_two_bits)
{
    struct world world;
    world_open(&world, (struct world_config){.ring = PACKED});
    forge_used(&world, 0, 0, HEADER + 60, USED);
    expect_nothing_received(&world);
    forge_used(&world, 0, 0, HEADER + 60, AVAILABLE);
    expect_nothing_received(&world);
    world_close(&world);
}

/* What the driver has taken it has taken, and what it has posted since is in flight, whatever the flags then say. */
TEST(flags_changed_after_the_driver_looked)
{
    struct world world;
    world_open(&world, (struct world_config){.ring = PACKED, .rx_size = 4, .rx_count = 16});
    for (uint32_t at = 0; at < 4; at++)
        forge_used(&world, at, (uint16_t)at, HEADER + 60, AVAILABLE | USED);
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_rx, 4);
    for (uint32_t at = 0; at < 4; at++)
        forge_used(&world, at, (uint16_t)at, HEADER + 60, at % 2 ? USED : AVAILABLE | USED); /* of the lap before */
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_rx, 4);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_DEVICE), 4);
    world_close(&world);
}

/* One that is still there from before, with the bits of this lap: its id is not believed twice. */
TEST(id_repeated_in_the_next_descriptor)
{
    struct world world;
    world_open(&world, (struct world_config){.ring = PACKED, .rx_count = 32});
    forge_used(&world, 0, 0, HEADER + 60, AVAILABLE | USED);
    forge_used(&world, 1, 0, HEADER + 60, AVAILABLE | USED);
    world_expect_device_fault(&world, NB_FAULT_USED_ID);
    CHECK_EQ(world.counters.packets_rx, 1);
    world_close(&world);
}

TEST(descriptor_written_elsewhere)
{
    struct world world;
    world_open(&world, (struct world_config){.ring = PACKED});
    for (uint32_t offset = 1; offset < 64; offset++)
        forge_used(&world, offset, (uint16_t)offset, HEADER + 60, AVAILABLE | USED);
    expect_nothing_received(&world);
    forge_used(&world, 0, 0, HEADER + 60, AVAILABLE | USED);
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_rx, 64);
    world_close(&world);
}

/* A chain of two descriptors is used at once: the second one says nothing. */
TEST(used_descriptor_inside_a_chain)
{
    struct world world;
    struct fake_chain first, second;
    uint8_t frame[65536];
    uint32_t len;
    world_open(&world, (struct world_config){.ring = PACKED});
    if (world.config.ring.indirect) { /* there are none of two descriptors */
        world_close(&world);
        return;
    }
    send_one(&world, 0, 100);
    send_one(&world, 1, 100);
    world_pump_idle(&world);
    CHECK(fake_collect(&world.device, &first, frame, &len));
    CHECK(fake_collect(&world.device, &second, frame, &len));
    fake_complete(&world.device, &first);
    world.device.tx.used_index--; /* as if the chain had been of one descriptor */
    fake_complete(&world.device, &second);
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_tx, 1);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_DEVICE), 1);
    world_close(&world);
}

TEST(used_descriptor_with_nothing_in_flight)
{
    struct world world;
    uint16_t flags = AVAILABLE | USED;
    world_open(&world, (struct world_config){.ring = PACKED});
    memcpy(world.tx_memory.device + world.tx_layout.desc + 14, &flags, 2);
    world_expect_device_fault(&world, NB_FAULT_USED_JUMP);
    world_close(&world);
}

/* Nothing is shown to the device before everything is: neither a chain by itself, nor half a chain. */
TEST(chains_are_shown_together)
{
    struct world world;
    struct nb_segment segments[2] = {{.len = 12}, {.len = 60}};
    world_open(&world, (struct world_config){.ring = PACKED});
    for (int i = 0; i < 3; i++) {
        white_box_add(world.pump, segments, 2);
        CHECK_EQ(fake_available(&world.device.tx), 0);
    }
    white_box_show(world.pump);
    CHECK_EQ(fake_available(&world.device.tx), 3);
    world_discard(&world);
}

/* Any size will do; frames of more than a lap, both ways. */
TEST(queues_whose_size_is_no_power_of_two)
{
    const uint16_t sizes[] = {2, 3, 5, 7, 63, 65, 100};
    for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct world world;
        world_open(&world, (struct world_config){.ring = PACKED, .rx_size = sizes[i], .tx_size = sizes[i]});
        for (uint64_t frame = 0; frame < 5u * sizes[i]; frame++) {
            deliver(&world, frame, 60);
            send_one(&world, frame, 61);
            world_pump_idle(&world);
            release_one(&world, receive_one(&world, frame, 60));
            transmit_one(&world, frame, 61);
        }
        world_pump_idle(&world);
        CHECK_EQ(world.counters.packets_rx, 5 * sizes[i]);
        CHECK_EQ(world.counters.packets_tx, 5 * sizes[i]);
        world_close(&world);
    }
}

/* An event position that is nowhere: to be notified once too often harms nobody. */
TEST(event_position_outside_the_ring)
{
    struct world world;
    const uint16_t event[] = {0x7fff, 2}; /* and DESC */
    world_open(&world, (struct world_config){.ring = {.packed = true, .event_idx = true}});
    world_pump_idle(&world);
    fake_want_notifications(&world.device.tx, true);
    memcpy(world.tx_memory.device + world.tx_layout.device, event, 4);
    send_one(&world, 0, 60);
    world_pump_idle(&world);
    CHECK(fake_notified(&world.device.tx));
    world_close(&world);
}
