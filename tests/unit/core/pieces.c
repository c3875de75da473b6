/* Frames that a client sends in several pieces: they reach the device whole, and each way to lie about them is refused. */
#include "check.h"
#include "white_box.h"
#include "world.h"

#include <string.h>

enum { MANY = 34 };

static const struct world_config CONFIG = {.tx_max_pieces = MANY};

/* Sends frame `number` of `len` bytes in pieces of `part`, `at_once` entries at a time with a turn of the pump between. */
static void send_in_pieces(struct world *world, uint64_t number, uint32_t len, uint32_t part, uint32_t at_once)
{
    static uint8_t frame[65536];
    struct nb_piece pieces[64];
    uint32_t count = (len + part - 1) / part;
    frame_make(frame, number, len);
    CHECK_EQ(nb_client_allocate(&world->client, pieces, count), count);
    for (uint32_t i = 0; i < count; i++) {
        pieces[i].len = i + 1 < count ? part : len - i * part;
        pieces[i].flags = (uint8_t)((i ? NB_CONTINUATION : 0) | (i + 1 < count ? NB_MORE : 0));
        memcpy(pieces[i].data, frame + i * part, pieces[i].len);
    }
    for (uint32_t i = 0; i < count; i += at_once) {
        nb_client_send(&world->client, pieces + i, count - i < at_once ? count - i : at_once);
        nb_client_flush(&world->client);
        if (i + at_once < count)
            world_pump_idle(world);
    }
}

TEST(frames_in_pieces_of_every_size)
{
    const uint32_t parts[] = {1, 7, 1000, ROOM}, lengths[] = {SHORTEST, 33, 1514, 9014, 65535};
    for (unsigned p = 0; p < 4; p++)
        for (unsigned l = 0; l < 5; l++) {
            struct world world;
            if ((lengths[l] + parts[p] - 1) / parts[p] > MANY)
                continue;
            world_open(&world, CONFIG);
            for (uint32_t at_once = 1; at_once <= MANY; at_once += 11) {
                send_in_pieces(&world, l, lengths[l], parts[p], at_once);
                world_pump_idle(&world);
                transmit_one(&world, l, lengths[l]);
                world_pump_idle(&world);
                CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 64);
            }
            CHECK_EQ(world.counters.packets_tx, 4);
            CHECK_EQ(world.counters.bytes_tx, 4 * lengths[l]);
            world_close(&world);
        }
}

/* Each piece comes back on its own, under a new lease. */
TEST(pieces_are_acknowledged_one_by_one)
{
    struct world world;
    struct nb_piece pieces[64];
    world_open(&world, CONFIG);
    send_in_pieces(&world, 0, 9014, ROOM, MANY);
    world_pump_idle(&world);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_DEVICE), 5);
    CHECK_EQ(nb_client_allocate(&world.client, pieces, 64), 59);
    transmit_one(&world, 0, 9014);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_allocate(&world.client, pieces, 64), 5);
    for (uint32_t i = 0; i < 5; i++) {
        CHECK_EQ(pieces[i].dma_handle, forge_handle(SESSION, 2, NB_REGION_TX, i));
        CHECK_EQ(pieces[i].len, ROOM);
    }
    world_close(&world);
}

/* A frame whose end never comes keeps its pieces, and nothing else waits for it. */
TEST(unfinished_frame_blocks_nothing_that_is_received)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, CONFIG);
    CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), 1);
    piece.len = 100;
    piece.flags = NB_MORE;
    nb_client_send(&world.client, &piece, 1);
    for (uint64_t i = 0; i < 300; i++) {
        deliver(&world, i, 60);
        world_pump_idle(&world);
        release_one(&world, receive_one(&world, i, 60));
    }
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_DEVICE), 1);
    CHECK_EQ(fake_available(&world.device.tx), 0);
    world_close(&world);
}

/* A long frame that the queue has no room for waits, whole, and what comes behind it waits in the ring. */
TEST(frame_longer_than_the_room_in_the_queue)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_max_pieces = 7, .tx_size = 8});
    send_one(&world, 0, 60);
    send_in_pieces(&world, 1, 7 * ROOM, ROOM, MANY);
    send_one(&world, 2, 60);
    world_pump_idle(&world);
    CHECK_EQ(fake_available(&world.device.tx), 1);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_DEVICE), 8);
    transmit_one(&world, 0, 60);
    world_pump_idle(&world);
    CHECK_EQ(fake_available(&world.device.tx), 1);
    transmit_one(&world, 1, 7 * ROOM);
    world_pump_idle(&world);
    transmit_one(&world, 2, 60);
    world_pump_idle(&world);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 64);
    world_close(&world);
}

/* ---- Lies ----------------------------------------------------------------------------------------------------- */

struct lying_piece {
    uint32_t len;
    uint8_t flags;
    uint8_t queue;
};

/* Good up to the last of them, which is refused; the device sees nothing of the frame. */
static void refuse_last(const struct world_config *config, const struct lying_piece *lies, uint32_t count,
                        enum nb_refusal refusal)
{
    struct world world;
    struct nb_piece pieces[64];
    world_open(&world, *config);
    CHECK_EQ(nb_client_allocate(&world.client, pieces, count), count);
    for (uint32_t i = 0; i < count; i++) {
        pieces[i].len = lies[i].len;
        pieces[i].flags = lies[i].flags;
        pieces[i].queue = lies[i].queue;
    }
    nb_client_send(&world.client, pieces, count - 1);
    world_pump_idle(&world);
    nb_client_send(&world.client, pieces + count - 1, 1);
    world_expect_client_fault(&world, refusal);
    CHECK_EQ(fake_available(&world.device.tx), 0);
    world_close(&world);
}

#define REFUSE(refusal, ...)                                                                                           \
    do {                                                                                                               \
        const struct lying_piece lies[] = {__VA_ARGS__};                                                               \
        refuse_last(&CONFIG, lies, sizeof(lies) / sizeof(lies[0]), refusal);                                           \
    } while (0)

TEST(continuation_without_a_beginning)
{
    REFUSE(NB_REFUSE_PIECES, {60, NB_CONTINUATION, 0});
    REFUSE(NB_REFUSE_PIECES, {60, NB_CONTINUATION | NB_MORE, 0});
}

TEST(beginning_before_the_end)
{
    REFUSE(NB_REFUSE_PIECES, {60, NB_MORE, 0}, {60, 0, 0});
    REFUSE(NB_REFUSE_PIECES, {60, NB_MORE, 0}, {60, NB_MORE, 0});
    REFUSE(NB_REFUSE_PIECES, {60, NB_MORE, 0}, {60, NB_MORE | NB_CONTINUATION, 0}, {60, 0, 0});
}

TEST(empty_piece)
{
    REFUSE(NB_REFUSE_LENGTH, {0, NB_MORE, 0});
    REFUSE(NB_REFUSE_LENGTH, {60, NB_MORE, 0}, {0, NB_CONTINUATION, 0});
}

TEST(piece_longer_than_its_buffer)
{
    REFUSE(NB_REFUSE_LENGTH, {ROOM + 1, NB_MORE, 0});
    REFUSE(NB_REFUSE_LENGTH, {60, NB_MORE, 0}, {ROOM + 1, NB_CONTINUATION | NB_MORE, 0});
    REFUSE(NB_REFUSE_LENGTH, {60, NB_MORE, 0}, {0xffffffff, NB_CONTINUATION, 0});
}

TEST(pieces_shorter_than_an_ethernet_header_together)
{
    REFUSE(NB_REFUSE_LENGTH, {1, NB_MORE, 0}, {12, NB_CONTINUATION, 0});
}

TEST(piece_on_another_queue_than_the_first)
{
    struct world_config config = CONFIG;
    const struct lying_piece lies[] = {{60, NB_MORE, 1}, {60, NB_CONTINUATION, 0}};
    config.pairs = 2;
    refuse_last(&config, lies, 2, NB_REFUSE_QUEUE);
}

TEST(queue_that_there_is_not)
{
    REFUSE(NB_REFUSE_QUEUE, {60, 0, 1});
    REFUSE(NB_REFUSE_QUEUE, {60, 0, 255});
    REFUSE(NB_REFUSE_QUEUE, {60, NB_MORE, 8});
}

TEST(more_pieces_than_were_agreed)
{
    struct lying_piece lies[MANY + 1];
    for (uint32_t i = 0; i < MANY + 1; i++)
        lies[i] = (struct lying_piece){14, i ? NB_CONTINUATION | NB_MORE : NB_MORE, 0};
    refuse_last(&CONFIG, lies, MANY + 1, NB_REFUSE_PIECES);
    lies[MANY].flags = NB_CONTINUATION;
    refuse_last(&CONFIG, lies, MANY + 1, NB_REFUSE_PIECES);
}

TEST(frame_longer_than_was_agreed)
{
    struct world_config config = CONFIG;
    struct lying_piece lies[] = {{1500, NB_MORE, 0}, {1501, NB_CONTINUATION, 0}};
    config.tx_largest_frame = 3000;
    refuse_last(&config, lies, 2, NB_REFUSE_LENGTH);
    lies[1].flags |= NB_MORE;
    refuse_last(&config, lies, 2, NB_REFUSE_LENGTH);
}

TEST(same_buffer_twice_in_a_frame)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, CONFIG);
    CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), 1);
    piece.len = 60;
    piece.flags = NB_MORE;
    nb_client_send(&world.client, &piece, 1);
    piece.flags = NB_CONTINUATION;
    nb_client_send(&world.client, &piece, 1);
    world_expect_client_fault(&world, NB_REFUSE_OWNER);
    world_close(&world);
}
