/* Frames to be sent of a client that is trusted with their header: it is in front of the frame in its buffer, and both are
 * one descriptor. What such a client asks of the device is checked out of its reach all the same. */
#include "check.h"
#include "net_header.h"
#include "world.h"

#include <string.h>

static const struct net_header ASKS = {
    .flags = NET_HDR_F_NEEDS_CSUM, .hdr_len = 54, .csum_start = 34, .csum_offset = 16};
static const struct net_header ASKS_NOTHING;

static void send_piece(struct world *world, struct nb_piece *piece, uint32_t len, uint8_t flags)
{
    memset(piece->data, 0x5a, len);
    piece->len = len;
    piece->flags = flags;
    nb_client_send(&world->client, piece, 1);
    nb_client_flush(&world->client);
}

TEST(one_descriptor_whatever_the_length_and_whatever_was_there)
{
    struct world world;
    struct nb_piece piece;
    uint64_t bytes = 0;
    world_open(&world, (struct world_config){.tx_header_with_frame = true});
    for (uint32_t len = SHORTEST; len <= ROOM; len += 61) {
        CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), 1);
        memset(piece.data - HEADER, (int)len, HEADER);
        send_piece(&world, &piece, len, 0);
        world_pump_idle(&world);
        world_expect_sent(&world, 0x5a, len, 1, NULL);
        world_pump_idle(&world);
        bytes += len;
    }
    CHECK_EQ(world.counters.bytes_tx, bytes);
    world_close(&world);
}

TEST(short_frames_may_be_copied_all_the_same)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, (struct world_config){.tx_header_with_frame = true, .tx_copied = NB_TX_MOST_COPIED});
    for (uint32_t len = NB_TX_MOST_COPIED - 1; len <= NB_TX_MOST_COPIED + 1; len++) {
        CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), 1);
        send_piece(&world, &piece, len, 0);
        world_pump_idle(&world);
        memset(piece.data, len > NB_TX_MOST_COPIED ? 0x5a : 0x77, len); /* of a copy that is too late */
        world_expect_sent(&world, 0x5a, len, 1, NULL);
        world_pump_idle(&world);
    }
    world_close(&world);
}

/* A header that asks for something is checked, and nobody changes it any more; the next frame in that buffer has none. */
TEST(a_header_that_asks_for_something_is_out_of_reach)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, (struct world_config){.tx_header_with_frame = true, .tx_count = 1, .offloads = TX_OFFLOADS});
    CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), 1);
    memcpy(piece.data - HEADER, &ASKS, HEADER);
    send_piece(&world, &piece, 600, NB_HEADER);
    world_pump_idle(&world);
    memset(piece.data - HEADER, 0xff, HEADER);
    world_expect_sent(&world, 0x5a, 600, 2, &ASKS);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), 1);
    send_piece(&world, &piece, 600, 0);
    world_pump_idle(&world);
    world_expect_sent(&world, 0x5a, 600, 1, NULL);
    world_pump_idle(&world);
    world_close(&world);
}

TEST(a_header_that_does_not_hold_is_refused)
{
    struct world world;
    struct nb_piece piece;
    struct net_header wrong = ASKS;
    world_open(&world, (struct world_config){.tx_header_with_frame = true, .offloads = TX_OFFLOADS});
    wrong.csum_start = 700;
    CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), 1);
    memcpy(piece.data - HEADER, &wrong, HEADER);
    send_piece(&world, &piece, 600, NB_HEADER);
    world_expect_client_fault(&world, NB_REFUSE_HEADER);
    world_discard(&world);
}

TEST(a_frame_in_pieces_has_its_header_apart)
{
    struct world world;
    struct nb_piece pieces[2];
    world_open(&world, (struct world_config){.tx_header_with_frame = true, .tx_max_pieces = 2});
    CHECK_EQ(nb_client_allocate(&world.client, pieces, 2), 2);
    memset(pieces[0].data - HEADER, 0xff, HEADER);
    send_piece(&world, &pieces[0], 700, NB_MORE);
    send_piece(&world, &pieces[1], 700, NB_CONTINUATION);
    world_pump_idle(&world);
    world_expect_sent(&world, 0x5a, 1400, 3, NULL);
    world_pump_idle(&world);
    world_close(&world);
}

/* The header that the device put in front of a frame when it came is not in front of it when it goes. */
TEST(a_forwarded_frame_has_its_header_with_it)
{
    struct world world;
    uint8_t frame[65536];
    uint32_t len;
    struct fake_chain chain;
    world_open(&world, (struct world_config){.tx_header_with_frame = true});
    deliver(&world, 7, 1000);
    world_pump_idle(&world);
    struct nb_piece piece = receive_one(&world, 7, 1000);
    nb_client_forward(&world.client, &piece, 1);
    nb_client_flush(&world.client);
    world_pump_idle(&world);
    CHECK(fake_collect(&world.device, &chain, frame, &len));
    CHECK_EQ(chain.segments, 1);
    CHECK_EQ(len, 1000);
    CHECK(frame_is(frame, 7, len, false));
    CHECK_EQ(memcmp(world.device.sent_header, &ASKS_NOTHING, HEADER), 0);
    fake_complete(&world.device, &chain);
    world_pump_idle(&world);
    world_close(&world);
}
