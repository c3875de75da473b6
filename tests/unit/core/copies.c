/* Short frames to be sent, which the pump copies behind their header: one descriptor, and out of the client's reach. */
#include "check.h"
#include "net_header.h"
#include "world.h"

#include <string.h>

enum { COPIED = NB_TX_MOST_COPIED };

static void send_frame(struct world *world, struct nb_piece *piece, uint8_t fill, uint32_t len)
{
    CHECK_EQ(nb_client_allocate(&world->client, piece, 1), 1);
    memset(piece->data, fill, len);
    piece->len = len;
    piece->flags = 0;
    nb_client_send(&world->client, piece, 1);
    nb_client_flush(&world->client);
}

TEST(copied_up_to_the_limit_and_not_beyond)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, (struct world_config){.tx_copied = COPIED});
    uint64_t bytes = 0;
    for (uint32_t len = SHORTEST; len <= COPIED + 66; len++) {
        send_frame(&world, &piece, (uint8_t)len, len);
        world_pump_idle(&world);
        world_expect_sent(&world, (uint8_t)len, len, len <= COPIED ? 1 : 2, NULL);
        world_pump_idle(&world);
        bytes += len;
    }
    CHECK_EQ(world.counters.bytes_tx, bytes);
    world_close(&world);
}

TEST(what_a_client_writes_later_is_not_sent)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, (struct world_config){.tx_copied = COPIED});
    send_frame(&world, &piece, 0x11, 60);
    world_pump_idle(&world);
    memset(piece.data, 0x22, 60);
    world_expect_sent(&world, 0x11, 60, 1, NULL);
    world_pump_idle(&world);
    world_close(&world);
}

/* A whole queue of them, each in the slot of its own buffer, and the buffers used again and again. */
TEST(every_buffer_has_its_copy)
{
    struct world world;
    struct nb_piece pieces[64];
    world_open(&world, (struct world_config){.tx_copied = COPIED, .tx_size = 128, .tx_count = 64});
    for (uint8_t lap = 0; lap < 3; lap++) {
        for (uint8_t i = 0; i < 64; i++)
            send_frame(&world, &pieces[i], (uint8_t)(lap * 64 + i), 60u + i);
        world_pump_idle(&world);
        for (uint8_t i = 0; i < 64; i++)
            world_expect_sent(&world, (uint8_t)(lap * 64 + i), 60u + i, 1, NULL);
        world_pump_idle(&world);
    }
    world_close(&world);
}

/* A header that asks for something is in the slot, too, but nothing of it is in front of a later frame. */
TEST(a_header_of_an_earlier_frame_is_not_in_front_of_a_copied_one)
{
    static const struct net_header ASKS = {
        .flags = NET_HDR_F_NEEDS_CSUM, .hdr_len = 54, .csum_start = 34, .csum_offset = 16};
    struct world world;
    struct nb_piece piece;
    struct fake_chain chain;
    uint8_t frame[65536];
    uint32_t sent;
    world_open(&world, (struct world_config){.tx_copied = COPIED, .tx_count = 1, .offloads = TX_OFFLOADS});
    CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), 1);
    memset(piece.data, 0x33, 100);
    memcpy(piece.data - HEADER, &ASKS, HEADER);
    piece.len = 100;
    piece.flags = NB_HEADER;
    nb_client_send(&world.client, &piece, 1);
    world_pump_idle(&world);
    CHECK(fake_collect(&world.device, &chain, frame, &sent));
    CHECK_EQ(chain.segments, 2);
    CHECK_EQ(memcmp(world.device.sent_header, &ASKS, HEADER), 0);
    fake_complete(&world.device, &chain);
    world_pump_idle(&world);
    send_frame(&world, &piece, 0x44, 100);
    world_pump_idle(&world);
    world_expect_sent(&world, 0x44, 100, 1, NULL);
    world_pump_idle(&world);
    world_close(&world);
}

/* Wrong handles ahead of where the pump is are fetched from no further than the region, and refused in their turn. */
TEST(a_wrong_handle_behind_frames_that_are_copied)
{
    struct world world;
    struct nb_piece pieces[20];
    world_open(&world, (struct world_config){.tx_copied = COPIED});
    CHECK_EQ(nb_client_allocate(&world.client, pieces, 20), 20);
    for (int i = 0; i < 20; i++) {
        memset(pieces[i].data, 0x55, 60);
        pieces[i].len = 60;
    }
    pieces[15].dma_handle |= 0xffffff;
    nb_client_send(&world.client, pieces, 20);
    world_expect_client_fault(&world, NB_REFUSE_INDEX);
    world_discard(&world);
}
