/* Several queue pairs: each frame keeps its pair, no pair waits for another, and the buffers are for all of them. */
#include "check.h"
#include "white_box.h"
#include "world.h"

#include <stdlib.h>

#include <sys/eventfd.h>

static void deliver_on(struct world *world, uint32_t pair, uint64_t number, uint32_t len)
{
    uint8_t frame[65536];
    frame_make(frame, number, len);
    CHECK(fake_deliver(device_of(world, pair), frame, len) != 0);
}

static void send_on(struct world *world, uint8_t pair, uint64_t number, uint32_t len)
{
    struct nb_piece piece;
    CHECK_EQ(nb_client_allocate(&world->client, &piece, 1), 1);
    frame_make(piece.data, number, len);
    piece.len = len;
    piece.queue = pair;
    nb_client_send(&world->client, &piece, 1);
    nb_client_flush(&world->client);
}

static void transmit_on(struct world *world, uint32_t pair, uint64_t number, uint32_t len)
{
    uint8_t frame[65536];
    uint32_t sent;
    struct fake_chain chain;
    CHECK(fake_collect(device_of(world, pair), &chain, frame, &sent));
    CHECK_EQ(sent, len);
    CHECK(frame_is(frame, number, len, false));
    fake_complete(device_of(world, pair), &chain);
}

TEST(each_frame_keeps_its_pair)
{
    struct world world;
    world_open(&world, (struct world_config){.pairs = 8, .rx_count = 256});
    for (uint32_t round = 0; round < 20; round++) {
        for (uint32_t pair = 0; pair < 8; pair++) {
            deliver_on(&world, pair, pair, 60 + pair);
            send_on(&world, (uint8_t)pair, 100 + pair, 80 + pair);
        }
        world_pump_idle(&world);
        for (uint32_t i = 0; i < 8; i++) {
            struct nb_piece piece;
            CHECK_EQ(nb_client_receive(&world.client, &piece, 1), 1);
            CHECK(piece.queue < 8);
            CHECK_EQ(piece.len, 60 + piece.queue);
            CHECK(frame_is(piece.data, piece.queue, piece.len, false));
            release_one(&world, piece);
        }
        for (uint32_t pair = 0; pair < 8; pair++)
            transmit_on(&world, pair, 100 + pair, 80 + pair);
        world_pump_idle(&world);
    }
    CHECK_EQ(world.counters.packets_rx, 160);
    CHECK_EQ(world.counters.packets_tx, 160);
    world_close(&world);
}

/* One pair's frame of several buffers is half there; the others' frames pass it. */
TEST(half_a_frame_on_one_pair_holds_up_no_other)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, (struct world_config){.pairs = 2, .max_pieces = 34});
    world.device.lie = FAKE_NUM_BUFFERS_NEVER_REACHED;
    deliver_on(&world, 0, 0, 4000);
    for (uint64_t i = 0; i < 100; i++) {
        deliver_on(&world, 1, i, 5000);
        world_pump_idle(&world);
        for (int part = 0; part < 3; part++) {
            CHECK_EQ(nb_client_receive(&world.client, &piece, 1), 1);
            CHECK_EQ(piece.queue, 1);
            release_one(&world, piece);
        }
    }
    world_close(&world);
}

/* The device takes nothing from pair 0 any more: what is sent on pair 1 goes on, in order, until there is no buffer left. */
TEST(pair_that_stands_still_holds_up_no_other)
{
    struct world world;
    world_open(&world, (struct world_config){.pairs = 2, .tx_size = 4, .tx_count = 32});
    for (uint64_t i = 0; i < 16; i++)
        send_on(&world, 0, i, 60);
    for (uint64_t i = 0; i < 100; i++) {
        send_on(&world, 1, i, 70);
        world_pump_idle(&world);
        transmit_on(&world, 1, i, 70);
        world_pump_idle(&world);
    }
    CHECK_EQ(fake_available(&world.device.tx), tx_room(&world));
    for (uint64_t i = 0; i < 16; i++) {
        transmit_on(&world, 0, i, 60);
        world_pump_idle(&world);
    }
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 32);
    world_close(&world);
}

static int stalled_pair(struct world *world)
{
    struct nb_pump_result result;
    nb_pump_run(world->pump, &result);
    CHECK_EQ(result.event, NB_EVENT_DEVICE_FAULT);
    CHECK_EQ(result.detail, NB_FAULT_STALLED);
    return nb_pump_stalled_pair(world->pump);
}

/* Whether the reset of a queue was in vain shows in what that queue sends, whatever the others do. */
TEST(queue_reset_in_vain)
{
    struct world world;
    world_open(&world, (struct world_config){.pairs = 2, .stall_ns = 100000000});
    send_on(&world, 0, 0, 60);
    CHECK_EQ(stalled_pair(&world), 0);
    struct fake_queue_place place = world.device.tx.place;
    free(world.device.tx.held);
    CHECK_EQ(nb_pump_reset_queue(world.pump, world.tx_queue), 1);
    fake_attach(&world.device, &world.device.tx, place);
    send_on(&world, 0, 1, 60);
    send_on(&world, 1, 2, 70);
    world_pump_idle(&world);
    transmit_on(&world, 1, 2, 70);
    CHECK_EQ(stalled_pair(&world), -1);
    transmit_on(&world, 0, 1, 60);
    send_on(&world, 0, 3, 60);
    CHECK_EQ(stalled_pair(&world), 0);
    CHECK_EQ(world.counters.packets_tx, 2);
    world_close(&world);
}

/* A pair under full load gets its burst a round, and no more before the others had theirs. */
TEST(busy_pair_does_not_delay_the_others)
{
    struct world world;
    struct nb_piece pieces[64];
    world_open(&world, (struct world_config){.pairs = 3, .rx_count = 192, .burst = 8});
    for (uint64_t i = 0; i < 64; i++)
        deliver_on(&world, 0, i, 60);
    deliver_on(&world, 1, 0, 61);
    deliver_on(&world, 2, 0, 62);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_receive(&world.client, pieces, 64), 64);
    uint32_t last_of_others = 0;
    for (uint32_t i = 0; i < 64; i++)
        if (pieces[i].queue != 0)
            last_of_others = i;
    CHECK(last_of_others > 0);
    CHECK(last_of_others < 2 * 8 + 2);
    world_close(&world);
}

/* No pair's queue takes all the buffers, also when they come back a few at a time. */
TEST(buffers_are_shared_out)
{
    struct world world;
    struct nb_piece pieces[64];
    world_open(&world, (struct world_config){.pairs = 4, .rx_size = 64, .rx_count = 64, .client_limit = 60});
    for (uint32_t pair = 0; pair < 4; pair++)
        CHECK_EQ(fake_available(&device_of(&world, pair)->rx), 16);
    for (uint32_t pair = 0; pair < 4; pair++)
        for (uint64_t i = 0; i < 15; i++)
            deliver_on(&world, pair, i, 60);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_receive(&world.client, pieces, 64), 60);
    for (uint32_t i = 0; i < 60; i++) {
        release_one(&world, pieces[i]);
        world_pump_idle(&world);
    }
    for (uint32_t pair = 0; pair < 4; pair++)
        CHECK_EQ(fake_available(&device_of(&world, pair)->rx), 16);
    world_close(&world);
}

TEST(interrupt_of_any_pair_wakes_the_pump)
{
    struct world world;
    world_open(&world, (struct world_config){.pairs = 3});
    for (uint32_t pair = 0; pair < 3; pair++) {
        world_pump_idle(&world);
        CHECK(white_box_ask_for_wakeup(world.pump));
        deliver_on(&world, pair, 0, 60);
        fake_interrupt(device_of(&world, pair), &device_of(&world, pair)->rx);
        CHECK(is_rung(pair ? world.more[pair - 1].irq_fd : world.rx_irq_fd));
        CHECK(!white_box_ask_for_wakeup(world.pump));
    }
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_rx, 3);
    world_close(&world);
}

/* A lie on one of them is the device's. */
TEST(device_lies_on_a_later_pair)
{
    struct world world;
    world_open(&world, (struct world_config){.pairs = 3});
    world.more[1].device.lie = FAKE_ID_OUT_OF_RANGE;
    deliver_on(&world, 2, 0, 60);
    world_expect_device_fault(&world, NB_FAULT_USED_ID);
    world_discard(&world);
}
