/* Received frames that the client sends from where they are: each goes out as it stands, and its buffer is free when
 * the device is done with it and not before. What a client may not do with them is in forwarding_lies.c.
 */
#include "check.h"
#include "ledger.h"
#include "net_header.h"
#include "white_box.h"
#include "world.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

enum { COPIED = NB_TX_MOST_COPIED, LONG = 1000, SHORT = 60 };

static const struct world_config COPYING = {.tx_copied = COPIED};

/* What the device sends next on a pair: frame `number` in so many descriptors, and a header that asks for nothing. */
static void expect_sent(struct world *world, uint32_t pair, uint64_t number, uint32_t len, unsigned descriptors)
{
    static const uint8_t nothing[HEADER];
    uint8_t frame[65536];
    uint32_t sent;
    struct fake_chain chain;
    CHECK(fake_collect(device_of(world, pair), &chain, frame, &sent));
    CHECK_EQ(sent, len);
    CHECK(frame_is(frame, number, len, false));
    CHECK_EQ(chain.segments, descriptors);
    CHECK_EQ(memcmp(device_of(world, pair)->sent_header, nothing, HEADER), 0);
    fake_complete(device_of(world, pair), &chain);
}

static uint32_t rx_owned(const struct world *world, enum nb_owner owner)
{
    return nb_ledger_owned(world->rx_ledger, owner);
}

TEST(a_forwarded_frame_is_sent_and_its_buffer_comes_back)
{
    struct world world;
    world_open(&world, (struct world_config){.rx_size = 64, .rx_count = 64});
    const uint32_t *done = &world.client.tx_done.header->produced;
    uint32_t acknowledged = *done;
    forward_on(&world, obtain(&world, 1, LONG), 0);
    world_pump_idle(&world);
    CHECK_EQ(rx_owned(&world, NB_OWNER_CLIENT), 0);
    CHECK_EQ(fake_available(&world.device.rx), 63); /* the last one is still under way */
    expect_sent(&world, 0, 1, LONG, 2);
    world_pump_idle(&world);
    CHECK_EQ(fake_available(&world.device.rx), 64);
    CHECK_EQ(*done, acknowledged); /* no word of it to the client */
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 64);
    CHECK_EQ(world.counters.packets_tx, 1);
    CHECK_EQ(world.counters.bytes_tx, LONG);
    world_close(&world);
}

/* Whoever may write changes a frame where it is. */
TEST(a_changed_frame_is_sent_as_it_stands)
{
    for (uint32_t len = SHORT; len <= LONG; len += LONG - SHORT) {
        struct world world;
        world_open(&world, (struct world_config){.rx_writable = true, .tx_copied = COPIED});
        struct nb_piece piece = obtain(&world, 1, len);
        piece.len = len + 10;
        frame_make(piece.data, 77, piece.len);
        forward_on(&world, piece, 0);
        world_pump_idle(&world);
        expect_sent(&world, 0, 77, len + 10, len == SHORT ? 1 : 2);
        world_pump_idle(&world);
        world_close(&world);
    }
}

/* A short one is copied: one descriptor, its buffer is free at once, and out of the client's reach. */
TEST(a_short_forwarded_frame_leaves_its_buffer_behind)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_copied = COPIED, .rx_writable = true, .rx_size = 64, .rx_count = 64});
    struct nb_piece piece = obtain(&world, 1, SHORT);
    forward_on(&world, piece, 0);
    world_pump_idle(&world);
    CHECK_EQ(fake_available(&world.device.rx), 64);
    memset(piece.data, 0xee, SHORT);
    expect_sent(&world, 0, 1, SHORT, 1);
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_tx, 1);
    CHECK_EQ(world.counters.bytes_tx, SHORT);
    world_close(&world);
}

TEST(forwarded_frames_of_every_length)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_copied = COPIED});
    for (uint32_t len = SHORTEST; len <= ROOM; len += len < 2 * COPIED ? 1 : 31) {
        forward_on(&world, obtain(&world, len, len), 0);
        world_pump_idle(&world);
        expect_sent(&world, 0, len, len, len <= COPIED ? 1 : 2);
    }
    world_pump_idle(&world);
    CHECK_EQ(world.counters.bytes_rx, world.counters.bytes_tx);
    world_close(&world);
}

/* As many at once as the queue takes, each in a slot of its own, and the slots used again and again; completed in any
 * order. */
TEST(every_short_frame_on_its_way_has_a_slot)
{
    enum { AT_ONCE = 63 }; /* and room for a frame in two descriptors, which may come next */
    struct world world;
    struct nb_piece pieces[AT_ONCE];
    struct fake_chain chains[AT_ONCE];
    uint8_t frame[65536];
    uint32_t len;
    world_open(&world, COPYING);
    for (uint64_t lap = 0; lap < 4; lap++) {
        for (uint64_t i = 0; i < AT_ONCE; i++)
            deliver(&world, AT_ONCE * lap + i, 60 + (uint32_t)i);
        world_pump_idle(&world);
        CHECK_EQ(nb_client_receive(&world.client, pieces, AT_ONCE), AT_ONCE);
        nb_client_forward(&world.client, pieces, AT_ONCE);
        world_pump_idle(&world);
        for (uint64_t i = 0; i < AT_ONCE; i++) {
            CHECK(fake_collect(&world.device, &chains[i], frame, &len));
            CHECK(frame_is(frame, AT_ONCE * lap + i, 60 + (uint32_t)i, false));
        }
        for (uint32_t i = 0; i < AT_ONCE; i++)
            fake_complete(&world.device, &chains[world.config.ring.in_order ? i : (i * 37 + (uint32_t)lap) % AT_ONCE]);
        world_pump_idle(&world);
    }
    CHECK_EQ(world.counters.packets_tx, 4 * AT_ONCE);
    world_close(&world);
}

/* The same place of another pair's queue has a slot of its own. */
TEST(each_pair_has_slots_of_its_own)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_copied = COPIED, .pairs = 3, .rx_count = 192});
    for (uint8_t pair = 0; pair < 3; pair++)
        forward_on(&world, obtain(&world, pair, SHORT), pair);
    world_pump_idle(&world);
    for (uint8_t pair = 0; pair < 3; pair++)
        expect_sent(&world, pair, pair, SHORT, 1);
    world_pump_idle(&world);
    world_close(&world);
}

/* Each way that a frame can go, behind each other way. */
TEST(forwarded_and_sent_frames_keep_their_order)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_copied = COPIED, .tx_size = 16});
    for (uint64_t i = 0; i < 40; i++) {
        uint32_t len = i % 3 ? LONG : SHORT;
        if (i & 4)
            send_one(&world, i, len);
        else
            forward_on(&world, obtain(&world, i, len), 0);
    }
    for (uint64_t i = 0; i < 40; i++) {
        world_pump_idle(&world);
        expect_sent(&world, 0, i, i % 3 ? LONG : SHORT, i % 3 ? 2 : 1);
    }
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_tx, 40);
    world_close(&world);
}

/* With offloads a received frame has a header, which is not sent. */
TEST(the_header_of_a_received_frame_stays_behind)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, (struct world_config){.offloads = TX_OFFLOADS | RX_OFFLOADS});
    world.device.header[0] = NET_HDR_F_DATA_VALID;
    deliver(&world, 1, LONG);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_receive(&world.client, &piece, 1), 1);
    CHECK_EQ(piece.flags, NB_HEADER);
    forward_on(&world, piece, 0);
    world_pump_idle(&world);
    expect_sent(&world, 0, 1, LONG, 2);
    world_pump_idle(&world);
    world_close(&world);
}

/* ---- What is forwarded and not sent yet ------------------------------------------------------------------------ */

TEST(a_full_queue_holds_forwarded_frames_back)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_size = 8});
    for (uint64_t i = 0; i < 40; i++)
        forward_on(&world, obtain(&world, i, LONG), 0);
    CHECK_EQ(fake_available(&world.device.tx), tx_room(&world));
    for (uint64_t i = 0; i < 40; i++) {
        expect_sent(&world, 0, i, LONG, 2);
        world_pump_idle(&world);
    }
    CHECK_EQ(rx_owned(&world, NB_OWNER_CLIENT), 0);
    world_close(&world);
}

/* Those for a pair that stands still wait in its backlog, where they hold up nobody; short ones among them are not
 * copied. */
TEST(forwarded_frames_wait_in_the_backlog_of_their_pair)
{
    struct world world;
    world_open(&world, (struct world_config){.pairs = 2, .tx_size = 4, .tx_copied = COPIED, .rx_count = 128});
    for (uint64_t i = 0; i < 16; i++)
        forward_on(&world, obtain(&world, i, i % 2 ? SHORT : LONG), 0);
    for (uint64_t i = 0; i < 50; i++) {
        forward_on(&world, obtain(&world, i, LONG), 1);
        world_pump_idle(&world);
        expect_sent(&world, 1, i, LONG, 2);
        world_pump_idle(&world);
    }
    uint64_t before = world.counters.packets_tx;
    for (uint64_t i = 0; i < 16; i++) {
        uint8_t frame[65536];
        uint32_t len;
        struct fake_chain chain;
        CHECK(fake_collect(&world.device, &chain, frame, &len));
        CHECK_EQ(len, i % 2 ? SHORT : LONG);
        CHECK(frame_is(frame, i, len, false));
        fake_complete(&world.device, &chain);
        world_pump_idle(&world);
    }
    CHECK_EQ(world.counters.packets_tx, before + 16);
    CHECK_EQ(rx_owned(&world, NB_OWNER_CLIENT), 0);
    world_close(&world);
}

/* Or a client could have all buffers waiting to be sent, and the device none to receive into. */
TEST(what_is_not_sent_yet_counts_as_held)
{
    struct world world;
    world_open(&world, (struct world_config){.client_limit = 10});
    for (uint64_t i = 0; i < 8; i++)
        forward_on(&world, obtain(&world, i, LONG), 0);
    for (uint64_t i = 0; i < 5; i++)
        deliver(&world, 100 + i, SHORT);
    world_pump_idle(&world);
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], 3);
    release_one(&world, receive_one(&world, 100, SHORT));
    release_one(&world, receive_one(&world, 101, SHORT));
    for (uint64_t i = 0; i < 8; i++)
        expect_sent(&world, 0, i, LONG, 2);
    world_pump_idle(&world);
    for (uint64_t i = 0; i < 11; i++)
        deliver(&world, i, SHORT);
    world_pump_idle(&world);
    CHECK_EQ(rx_owned(&world, NB_OWNER_CLIENT), 10);
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], 4);
    world_close(&world);
}

/* On one processor frames are not dropped for it, but left with the device, and the device's interrupt makes them go
 * on. */
TEST(on_one_processor_what_is_not_sent_yet_is_waited_for)
{
    struct world world;
    struct nb_piece pieces[8];
    world_open(&world, (struct world_config){.yields = true, .client_limit = 8});
    for (uint64_t i = 0; i < 16; i++)
        deliver(&world, i, LONG);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_receive(&world.client, pieces, 8), 8);
    nb_client_forward(&world.client, pieces, 8);
    nb_client_flush(&world.client);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_receive(&world.client, pieces, 8), 0);
    CHECK(white_box_ask_for_wakeup(world.pump));
    for (uint64_t i = 0; i < 8; i++)
        expect_sent(&world, 0, i, LONG, 2);
    fake_interrupt(&world.device, &world.device.tx);
    CHECK(is_rung(world.tx_irq_fd));
    white_box_stop_asking(world.pump);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_receive(&world.client, pieces, 8), 8);
    CHECK(frame_is(pieces[7].data, 15, LONG, false));
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], 0);
    world_close(&world);
}

/* ---- Resets ---------------------------------------------------------------------------------------------------- */

static void attach_anew(struct world *world, struct fake_queue *queue)
{
    struct fake_queue_place place = queue->place;
    free(queue->held);
    fake_attach(&world->device, queue, place);
}

/* Two of them completed before it, one copied and gone; those on their way are lost, their buffers are not. */
TEST(tx_queue_reset_with_forwarded_frames_in_flight)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_copied = COPIED});
    for (uint64_t i = 0; i < 10; i++)
        forward_on(&world, obtain(&world, i, i == 5 ? SHORT : LONG), 0);
    send_one(&world, 10, LONG);
    world_pump_idle(&world);
    expect_sent(&world, 0, 0, LONG, 2);
    expect_sent(&world, 0, 1, LONG, 2);
    CHECK_EQ(nb_pump_reset_queue(world.pump, world.tx_queue), 9);
    CHECK_EQ(world.counters.drops[NB_DROP_DEVICE_RESET], 9);
    CHECK_EQ(world.counters.packets_tx, 2);
    attach_anew(&world, &world.device.tx);
    world_pump_idle(&world);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 64);
    CHECK_EQ(rx_owned(&world, NB_OWNER_DEVICE), 64);
    for (uint64_t i = 0; i < 200; i++) {
        forward_on(&world, obtain(&world, i, LONG), 0);
        world_pump_idle(&world);
        expect_sent(&world, 0, i, LONG, 2);
    }
    world_pump_idle(&world);
    world_close(&world);
}

/* ---- The echo -------------------------------------------------------------------------------------------------- */

/* What came in one buffer is forwarded, what came in several is copied: in their order, though some wait for buffers.
 * */
TEST(the_echo_forwards_what_it_can_and_copies_the_rest)
{
    struct world world;
    struct nb_echo_counts counts = {0};
    uint8_t frame[65536];
    uint32_t len, sent = 0, forwarded = 0;
    struct fake_chain chain;
    world_open(&world, (struct world_config){.rx_writable = true, .max_pieces = 34, .tx_max_pieces = 4, .tx_count = 8});
    CHECK_EQ(eventfd_write(world.client_control_fd, 1), 0);
    for (uint64_t i = 0; i < 20; i++) {
        uint32_t length = i % 3 == 1 ? 5000 : LONG;
        forwarded += length == LONG;
        deliver(&world, i, length);
    }
    while (sent < 20) {
        world_pump_idle(&world);
        CHECK_EQ(nb_client_echo(&world.client, world.client_control_fd, &counts), 0);
        world_pump_idle(&world);
        while (fake_collect(&world.device, &chain, frame, &len)) {
            CHECK_EQ(len, sent % 3 == 1 ? 5000 : LONG);
            CHECK(frame_is(frame, sent, len, true));
            fake_complete(&world.device, &chain);
            sent++;
        }
    }
    world_pump_idle(&world);
    CHECK_EQ(counts.frames, 20);
    CHECK_EQ(counts.forwarded, forwarded);
    CHECK_EQ(counts.bytes, world.counters.bytes_tx);
    CHECK_EQ(rx_owned(&world, NB_OWNER_CLIENT), 0);
    world_close(&world);
}

/* An RX buffer may hold more than the session lets a client send. */
TEST(the_echo_forwards_nothing_that_may_not_be_sent)
{
    struct world world;
    struct nb_echo_counts counts = {0};
    world_open(&world, (struct world_config){.rx_writable = true});
    CHECK_EQ(eventfd_write(world.client_control_fd, 1), 0);
    world.client.tx_largest_frame = LONG;
    deliver(&world, 0, LONG + 1);
    deliver(&world, 1, LONG);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_echo(&world.client, world.client_control_fd, &counts), 0);
    world_pump_idle(&world);
    CHECK_EQ(counts.unsendable, 1);
    CHECK_EQ(counts.forwarded, 1);
    CHECK_EQ(fake_available(&world.device.tx), 1);
    CHECK_EQ(rx_owned(&world, NB_OWNER_CLIENT), 0);
    world_discard(&world);
}
