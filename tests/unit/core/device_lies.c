/* A device that lies: each lie ends the pump with the fault that names it, is counted once, and costs no buffer.
 *
 * Names say which known failure of other drivers a case stands for.
 */
#include "check.h"
#include "white_box.h"
#include "world.h"

#include <string.h>

static const struct world_config FEW_BUFFERS = {.rx_count = 32}; /* in a queue of 64: some descriptors are free */

static void expect_lie_on_receive(struct world_config config, enum fake_lie lie, enum nb_device_fault fault)
{
    struct world world;
    world_open(&world, config);
    deliver(&world, 0, 100);
    world_pump_idle(&world);
    world.device.lie = lie;
    deliver(&world, 1, 200);
    world_expect_device_fault(&world, fault);
    CHECK_EQ(world.counters.packets_rx, lie == FAKE_ID_TWICE ? 2 : 1);
    world_close(&world);
}

static void expect_lie_on_transmit(enum fake_lie lie, enum nb_device_fault fault)
{
    uint8_t frame[65536];
    uint32_t len;
    struct fake_chain first, second;
    struct world world;
    world_open(&world, (struct world_config){0});
    send_one(&world, 0, 100);
    send_one(&world, 1, 200);
    world_pump_idle(&world);
    CHECK(fake_collect(&world.device, &first, frame, &len));
    CHECK(fake_collect(&world.device, &second, frame, &len));
    world.device.lie = lie;
    fake_complete(&world.device, &first);
    world_expect_device_fault(&world, fault);
    CHECK_EQ(world.counters.packets_tx, lie == FAKE_ID_TWICE ? 1 : 0);
    world_close(&world);
}

static void expect_used_element(struct world_config config, uint32_t id, uint32_t len, enum nb_device_fault fault)
{
    struct world world;
    world_open(&world, config);
    fake_push(&world.device.rx, id, len);
    fake_publish(&world.device.rx);
    world_expect_device_fault(&world, fault);
    CHECK_EQ(world.counters.packets_rx, 0);
    CHECK_EQ(world.client.rx_active.header->produced, 0);
    world_close(&world);
}

TEST(used_id_out_of_range_on_receive)
{
    const uint32_t ids[] = {64, 65, 0xffff};
    for (unsigned i = 0; i < sizeof(ids) / sizeof(ids[0]); i++)
        expect_used_element((struct world_config){0}, ids[i], 100, NB_FAULT_USED_ID);
}

TEST(used_id_out_of_range_on_transmit) { expect_lie_on_transmit(FAKE_ID_OUT_OF_RANGE, NB_FAULT_USED_ID); }

TEST(used_id_not_in_flight_on_receive) { expect_used_element(FEW_BUFFERS, 40, 100, NB_FAULT_USED_ID); }

/* A chain is known by its head (or buffer id): the descriptor of its second part is not in flight by itself. */
TEST(used_id_of_a_chains_second_descriptor)
{
    struct world world;
    struct fake_chain chain;
    world_open(&world, (struct world_config){0});
    send_one(&world, 0, 100);
    world_pump_idle(&world);
    CHECK(fake_pop(&world.device, &world.device.tx, &chain));
    CHECK_EQ(chain.segments, 2);
    CHECK_EQ(chain.descriptors, world.config.ring.indirect ? 1 : 2);
    fake_push(&world.device.tx, chain.head + 1u, 0);
    fake_publish(&world.device.tx);
    world_expect_device_fault(&world, NB_FAULT_USED_ID);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_DEVICE), 1);
    world_close(&world);
}

TEST(used_id_twice_on_receive) { expect_lie_on_receive((struct world_config){0}, FAKE_ID_TWICE, NB_FAULT_USED_ID); }

TEST(used_id_twice_on_transmit) { expect_lie_on_transmit(FAKE_ID_TWICE, NB_FAULT_USED_ID); }

TEST(used_length_longer_than_the_buffer)
{
    expect_lie_on_receive((struct world_config){0}, FAKE_LENGTH_TOO_LONG, NB_FAULT_USED_LENGTH);
    expect_used_element((struct world_config){0}, 0, HEADER + ROOM + 1, NB_FAULT_USED_LENGTH);
    expect_used_element((struct world_config){0}, 0, 0x10000 + 100, NB_FAULT_USED_LENGTH);
    expect_used_element((struct world_config){0}, 0, 0x80000000, NB_FAULT_USED_LENGTH);
    expect_used_element((struct world_config){0}, 0, 0xffffffff, NB_FAULT_USED_LENGTH);
}

TEST(used_length_shorter_than_the_header)
{
    for (uint32_t len = 0; len < HEADER; len++)
        expect_used_element((struct world_config){0}, 0, len, NB_FAULT_USED_LENGTH);
    expect_lie_on_receive((struct world_config){.max_pieces = 4}, FAKE_LENGTH_TOO_SHORT, NB_FAULT_USED_LENGTH);
}

/* For a chain without writable descriptors the length means nothing (virtio 1.3 §2.7.8.3). */
TEST(used_length_of_a_sent_frame_is_not_looked_at)
{
    const uint32_t lengths[] = {0, 1, 112, 0xffffffff};
    struct world world;
    struct fake_chain chain;
    world_open(&world, (struct world_config){0});
    for (unsigned i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        send_one(&world, i, 100);
        world_pump_idle(&world);
        CHECK(fake_pop(&world.device, &world.device.tx, &chain));
        fake_give_back(&world.device.tx, &chain, lengths[i]);
        fake_publish(&world.device.tx);
        world_pump_idle(&world);
    }
    CHECK_EQ(world.counters.packets_tx, 4);
    CHECK_EQ(world.counters.bytes_tx, 400);
    world_close(&world);
}

TEST(num_buffers_zero)
{
    expect_lie_on_receive((struct world_config){.max_pieces = 4}, FAKE_NUM_BUFFERS_ZERO, NB_FAULT_NUM_BUFFERS);
}

TEST(num_buffers_more_than_a_frame_may_have)
{
    expect_lie_on_receive((struct world_config){.max_pieces = 4}, FAKE_NUM_BUFFERS_TOO_MANY, NB_FAULT_NUM_BUFFERS);
    /* One piece, told to be two where two are one too many. */
    expect_lie_on_receive((struct world_config){.max_pieces = 64}, FAKE_NUM_BUFFERS_TOO_MANY, NB_FAULT_NUM_BUFFERS);
}

/* Without MRG_RXBUF the field is there and means nothing. */
TEST(num_buffers_is_not_looked_at_without_mrg_rxbuf)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    world.device.lie = FAKE_NUM_BUFFERS_TOO_MANY;
    deliver(&world, 0, 100);
    world_pump_idle(&world);
    receive_one(&world, 0, 100);
    world_close(&world);
}

/* A merged frame whose num_buffers never ends: the client sees nothing of it, and every buffer stays booked. */
TEST(num_buffers_never_reached)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, (struct world_config){.max_pieces = 34});
    world.device.lie = FAKE_NUM_BUFFERS_NEVER_REACHED;
    deliver(&world, 0, 100);
    world_pump_idle(&world);
    CHECK_EQ(white_box_gathered(world.pump), 1);
    CHECK_EQ(nb_client_receive(&world.client, &piece, 1), 0);
    CHECK_EQ(world.counters.packets_rx, 0);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_DEVICE), 65); /* 64 posted, one gathered */
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_DRIVER), 63);
    world_close(&world);
}

/* Buffer after buffer, each claiming to begin a frame of the longest kind: what is gathered stays bounded. */
TEST(num_buffers_without_end)
{
    struct world world;
    struct fake_chain chain;
    struct nb_piece pieces[64];
    world_open(&world, (struct world_config){.max_pieces = 64});
    for (int i = 0; i < 1000; i++) {
        CHECK(fake_pop(&world.device, &world.device.rx, &chain));
        memset(chain.segment[0].at, 64, HEADER);
        chain.segment[0].at[11] = 0;
        fake_give_back(&world.device.rx, &chain, HEADER);
        fake_publish(&world.device.rx);
        world_pump_idle(&world);
        CHECK(white_box_gathered(world.pump) < 64);
        int received = nb_client_receive(&world.client, pieces, 64);
        CHECK(received >= 0);
        nb_client_release(&world.client, pieces, (uint32_t)received);
    }
    CHECK_EQ(world.counters.packets_rx, 1000 / 64);
    world_close(&world);
}

/* What came before the lie is good: the client gets it, and is woken for it. */
TEST(frames_before_a_lie_are_handed_over)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    world_pump_idle(&world);
    world.client.rx_active.header->wake = 1;
    for (int i = 0; i < 5; i++)
        deliver(&world, (uint64_t)i, 100);
    fake_push(&world.device.rx, 9999, 100);
    fake_publish(&world.device.rx);
    world_expect_device_fault(&world, NB_FAULT_USED_ID);
    for (int i = 0; i < 5; i++)
        receive_one(&world, (uint64_t)i, 100);
    CHECK(is_rung(world.client.driver_doorbell_fd));
    CHECK_EQ(world.client.rx_active.header->wake, 0);
    world_close(&world);
}

TEST(completions_before_a_lie_are_acknowledged)
{
    struct world world;
    struct nb_piece pieces[64];
    world_open(&world, (struct world_config){0});
    for (int i = 0; i < 3; i++)
        send_one(&world, (uint64_t)i, 100);
    world_pump_idle(&world);
    transmit_one(&world, 0, 100);
    transmit_one(&world, 1, 100);
    world.client.tx_done.header->wake = 1;
    fake_push(&world.device.tx, 9999, 0);
    fake_publish(&world.device.tx);
    world_expect_device_fault(&world, NB_FAULT_USED_ID);
    CHECK_EQ(world.counters.packets_tx, 2);
    CHECK(is_rung(world.client.driver_doorbell_fd));
    CHECK_EQ(nb_client_allocate(&world.client, pieces, 64), 63); /* 61 never used, 2 back, 1 with the device */
    world_close(&world);
}

/* Header left in the frame length; a frame shorter than an Ethernet header. */
TEST(header_is_not_part_of_the_frame)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    uint64_t bytes = 0;
    for (uint32_t len = 0; len <= 100; len++) {
        deliver(&world, len, len);
        world_pump_idle(&world);
        if (len >= SHORTEST)
            release_one(&world, receive_one(&world, len, len));
        bytes += len;
    }
    CHECK_EQ(world.counters.packets_rx, 101);
    CHECK_EQ(world.counters.bytes_rx, bytes);
    CHECK_EQ(world.counters.drops[NB_DROP_TOO_SHORT], SHORTEST);
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], 0);
    world_close(&world);
}

/* The driver keeps what it must know to itself: a device may scribble over descriptors and the available ring. */
TEST(descriptors_overwritten_while_in_flight)
{
    struct world world;
    struct fake_chain chains[64];
    world_open(&world, (struct world_config){0});
    for (int i = 0; i < 64; i++)
        CHECK(fake_pop(&world.device, &world.device.rx, &chains[i]));
    memset(world.rx_memory.device + world.rx_layout.desc, 0xee, 64 * 16);
    memset(world.rx_memory.device + world.rx_layout.driver, 0xee, world.config.ring.packed ? 4 : 4 + 64 * 2);
    for (int i = 0; i < 64; i++)
        fake_give_back(&world.device.rx, &chains[i], HEADER + 100);
    fake_publish(&world.device.rx);
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_rx, 64);
    world_close(&world);
}

/* Never completing: what the client has sent stays the device's, and everybody sleeps. */
TEST(device_that_never_completes)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, (struct world_config){0});
    for (int i = 0; i < 64; i++)
        send_one(&world, (uint64_t)i, 60);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), 0);
    uint32_t room = tx_room(&world);
    CHECK_EQ(nb_virtqueue_in_flight(world.tx_queue), room);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_DEVICE), room);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 64 - room);
    world_close(&world);
}

static void complete_out_of_order(struct world *world)
{
    struct fake_chain chains[3];
    const int order[] = {2, 0, 1};
    for (int i = 0; i < 3; i++) {
        CHECK(fake_pop(&world->device, &world->device.rx, &chains[i]));
        memset(chains[i].segment[0].at, 0, HEADER);
        frame_make(chains[i].segment[0].at + HEADER, (uint64_t)i, 60);
    }
    for (int i = 0; i < 3; i++)
        fake_push(&world->device.rx, chains[order[i]].head, HEADER + 60);
    fake_publish(&world->device.rx);
}

TEST(completions_out_of_order_on_receive)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    complete_out_of_order(&world);
    if (world.config.ring.in_order) {
        /* The third one, so all three; the first ones whole, as they must be who are not mentioned. */
        struct nb_piece pieces[64];
        world_pump_idle(&world);
        CHECK_EQ(nb_client_receive(&world.client, pieces, 64), 3);
        CHECK_EQ(pieces[0].len, ROOM);
        CHECK_EQ(pieces[1].len, ROOM);
        CHECK_EQ(pieces[2].len, 60);
    } else {
        world_pump_idle(&world);
        receive_one(&world, 2, 60);
        receive_one(&world, 0, 60);
        receive_one(&world, 1, 60);
    }
    world_close(&world);
}

/* ---- Ring indices that wrap ----------------------------------------------------------------------------------- */

/* Phantom frames at completion 65,536, and any other mistake about the wrap. */
TEST(no_phantom_frames_when_the_ring_index_wraps)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, (struct world_config){.rx_size = 8, .rx_count = 8, .queue_index = 65000});
    for (uint64_t i = 0; i < 67000; i++) {
        deliver(&world, i, 60);
        world_pump(&world);
        release_one(&world, receive_one(&world, i, 60));
        CHECK_EQ(nb_client_receive(&world.client, &piece, 1), 0);
    }
    CHECK_EQ(world.counters.packets_rx, 67000);
    world_close(&world);
}

/* A full queue across the wrap: neither taken for an empty one nor for a jump. */
TEST(full_queue_across_the_index_wrap)
{
    for (uint16_t before = 0; before <= 64; before++) {
        struct world world;
        world_open(&world, (struct world_config){.queue_index = (uint16_t)(65536 - before)});
        for (uint64_t i = 0; i < 64; i++)
            deliver(&world, i, 60);
        CHECK_EQ(fake_available(&world.device.rx), 0);
        world_pump_idle(&world);
        CHECK_EQ(world.counters.packets_rx, 64);
        CHECK_EQ(fake_available(&world.device.rx), 64);
        for (uint64_t i = 0; i < 32; i++)
            send_one(&world, i, 60);
        world_pump_idle(&world);
        CHECK_EQ(fake_available(&world.device.tx), 32);
        for (uint64_t i = 0; i < 32; i++)
            transmit_one(&world, i, 60);
        world_pump_idle(&world);
        CHECK_EQ(world.counters.packets_tx, 32);
        world_close(&world);
    }
}

TEST(full_queue_of_the_largest_size_across_the_index_wrap)
{
    struct world world;
    world_open(&world, (struct world_config){.rx_size = 32768, .rx_count = 32768, .queue_index = 65000, .client_limit = 1});
    for (uint64_t i = 0; i < 32768; i++)
        deliver(&world, i, 60);
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_rx, 32768);
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], 32767);
    CHECK_EQ(fake_available(&world.device.rx), 32767);
    world_close(&world);
}
