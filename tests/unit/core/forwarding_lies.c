/* A client that lies about what it forwards: refused as with any other handle, and the device gets nothing of it. */
#include "check.h"
#include "ledger.h"
#include "net_header.h"
#include "world.h"

enum { COPIED = NB_TX_MOST_COPIED, LONG = 1000, SHORT = 60 };

static const struct world_config COPYING = {.tx_copied = COPIED};

static const uint64_t NEXT_LEASE = 1ull << 32, NEXT_SESSION = 1ull << 48, NEXT_REGION = 1ull << 24;

static void put_entry(struct world *world, struct nb_entry entry)
{
    forge_entry(world, TX_ACTIVE, world->client.tx_active_put++, entry);
    forge_produced(world, TX_ACTIVE, world->client.tx_active_put);
}

/* What is wrong with an entry: added to a good handle, and the rest as it is to stand. */
struct lie {
    uint64_t add;
    uint32_t len;
    uint16_t kind;
    uint8_t flags;
    uint8_t queue;
};

/* A good one, then one that is wrong in one way: the device gets the one and not the other. */
static void refuse(struct world_config config, struct lie lie, enum nb_refusal refusal)
{
    struct world world;
    world_open(&world, config);
    struct nb_piece good = obtain(&world, 0, LONG), bad = obtain(&world, 1, LONG);
    forward_on(&world, good, 0);
    put_entry(&world, (struct nb_entry){.dma_handle = bad.dma_handle + lie.add,
                                        .len = lie.len,
                                        .kind = lie.kind,
                                        .flags = lie.flags,
                                        .queue = lie.queue});
    world_expect_client_fault(&world, refusal);
    transmit_one(&world, 0, LONG);
    CHECK_EQ(fake_available(&world.device.tx), 0);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 1);
    world_close(&world);
}

#define REFUSE(refusal, ...) refuse(COPYING, (struct lie){.kind = NB_TX_PACKET, .len = LONG, __VA_ARGS__}, refusal)

TEST(forwarded_handle_of_no_region)
{
    REFUSE(NB_REFUSE_REGION, .add = -NEXT_REGION);
    REFUSE(NB_REFUSE_REGION, .add = 2 * NEXT_REGION);
}
TEST(forwarded_handle_beyond_the_last_buffer)
{
    REFUSE(NB_REFUSE_INDEX, .add = 127); /* buffer 1 of 128, plus 127 */
    REFUSE(NB_REFUSE_INDEX, .add = 0xffffff - 1);
}
TEST(forwarded_handle_of_another_session)
{
    REFUSE(NB_REFUSE_SESSION, .add = NEXT_SESSION);
    REFUSE(NB_REFUSE_SESSION, .add = -NEXT_SESSION);
}
TEST(forwarded_handle_of_another_lease)
{
    REFUSE(NB_REFUSE_LEASE, .add = NEXT_LEASE);
    REFUSE(NB_REFUSE_LEASE, .add = -NEXT_LEASE);
}
TEST(forwarded_handle_of_a_buffer_never_lent) { REFUSE(NB_REFUSE_OWNER, .add = 100 - NEXT_LEASE); }
TEST(forwarded_entry_of_the_wrong_kind)
{
    const uint16_t kinds[] = {0, NB_RX_PACKET, NB_TX_PACKET_ACK, 0xffff};
    for (unsigned i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
        refuse(COPYING, (struct lie){.kind = kinds[i], .len = LONG}, NB_REFUSE_KIND);
}
/* Also where they would be right with a TX buffer. */
TEST(forwarded_entry_with_flags)
{
    const uint8_t flags[] = {NB_MORE, NB_CONTINUATION, NB_MORE | NB_CONTINUATION, NB_HEADER, 8, 0x80};
    struct world_config config = {.tx_max_pieces = 4, .offloads = TX_OFFLOADS};
    for (unsigned i = 0; i < sizeof(flags) / sizeof(flags[0]); i++)
        refuse(config, (struct lie){.kind = NB_TX_PACKET, .len = LONG, .flags = flags[i]}, NB_REFUSE_KIND);
}
TEST(forwarded_on_a_queue_that_there_is_not) { REFUSE(NB_REFUSE_QUEUE, .queue = 1); }
TEST(forwarded_frame_of_a_length_that_is_none)
{
    const uint32_t lengths[] = {0, 1, SHORTEST - 1, ROOM + 1, STRIDE, 0x10000 + LONG, 0x80000000, 0xffffffff};
    for (unsigned i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++)
        refuse(COPYING, (struct lie){.kind = NB_TX_PACKET, .len = lengths[i]}, NB_REFUSE_LENGTH);
}

TEST(forwarded_twice)
{
    for (uint32_t len = SHORT; len <= LONG; len += LONG - SHORT)
        for (int at_once = 0; at_once <= 1; at_once++) {
            struct world world;
            world_open(&world, (struct world_config){.tx_copied = COPIED, .rx_size = 4, .rx_count = 4});
            struct nb_piece piece = obtain(&world, 0, len);
            forward_on(&world, piece, 0);
            if (!at_once)
                world_pump_idle(&world);
            forward_on(&world, piece, 0);
            world_expect_client_fault(&world, NB_REFUSE_OWNER);
            transmit_one(&world, 0, len);
            CHECK_EQ(fake_available(&world.device.tx), 0);
            world_close(&world);
        }
}

TEST(released_after_it_was_forwarded)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    struct nb_piece piece = obtain(&world, 0, LONG);
    forward_on(&world, piece, 0);
    world_pump_idle(&world);
    release_one(&world, piece);
    world_expect_client_fault(&world, NB_REFUSE_OWNER);
    world_close(&world);
}

TEST(forwarded_after_it_was_released)
{
    struct world world;
    world_open(&world, (struct world_config){.rx_size = 4, .rx_count = 4});
    struct nb_piece piece = obtain(&world, 0, LONG);
    release_one(&world, piece);
    forward_on(&world, piece, 0);
    world_expect_client_fault(&world, NB_REFUSE_OWNER);
    CHECK_EQ(fake_available(&world.device.tx), 0);
    world_close(&world);
}

/* The device was done with it, it was filled and lent again: the old handle is worth nothing. */
TEST(forwarded_by_its_old_handle)
{
    struct world world;
    world_open(&world, (struct world_config){.rx_size = 1, .rx_count = 1});
    struct nb_piece old = obtain(&world, 0, LONG);
    forward_on(&world, old, 0);
    world_pump_idle(&world);
    transmit_one(&world, 0, LONG);
    world_pump_idle(&world);
    obtain(&world, 1, LONG);
    forward_on(&world, old, 0);
    world_expect_client_fault(&world, NB_REFUSE_LEASE);
    world_close(&world);
}

TEST(forwarded_in_the_midst_of_a_frame_in_pieces)
{
    struct world world;
    struct nb_piece piece, received;
    world_open(&world, (struct world_config){.tx_max_pieces = 4});
    received = obtain(&world, 0, LONG);
    CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), 1);
    piece.len = 100;
    piece.flags = NB_MORE;
    nb_client_send(&world.client, &piece, 1);
    forward_on(&world, received, 0);
    world_expect_client_fault(&world, NB_REFUSE_PIECES);
    CHECK_EQ(fake_available(&world.device.tx), 0);
    world_close(&world);
}

/* An RX buffer may hold more than may be sent. */
TEST(forwarded_frame_longer_than_may_be_sent)
{
    enum { LARGEST = 900 };
    struct world world;
    world_open(&world, (struct world_config){0});
    struct nb_pump_config config = world.pump_config;
    struct nb_region tx = world.tx_ledger->region;
    tx.stride = HEADROOM + LARGEST;
    struct nb_ledger *small = config.tx_ledger = nb_ledger_new(&tx);
    config.tx_largest_frame = LARGEST;
    nb_pump_free(world.pump);
    world.pump = nb_pump_new(&config);
    CHECK(world.pump != NULL);
    forward_on(&world, obtain(&world, 0, LARGEST), 0);
    world_pump_idle(&world);
    transmit_one(&world, 0, LARGEST);
    forward_on(&world, obtain(&world, 1, LARGEST + 1), 0);
    world_expect_client_fault(&world, NB_REFUSE_LENGTH);
    world_close(&world);
    nb_ledger_free(small);
}
