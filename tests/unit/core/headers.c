/* The virtio header, handed over both ways: what a client may ask the device for, and what it is refused. */
#include "check.h"
#include "net_header.h"
#include "world.h"

#include <pthread.h>
#include <string.h>

static const uint64_t ALL_TX = TX_OFFLOADS;

static const struct net_header TSO4 = {.flags = NET_HDR_F_NEEDS_CSUM,
                                       .gso_type = NET_HDR_GSO_TCPV4,
                                       .hdr_len = 54,
                                       .gso_size = 1448,
                                       .csum_start = 34,
                                       .csum_offset = 16};

/* Sends a frame of two pieces of 1,000 bytes with this header in front. */
static struct nb_piece send_with_header(struct world *world, struct net_header header, bool flag)
{
    struct nb_piece pieces[2];
    CHECK_EQ(nb_client_allocate(&world->client, pieces, 2), 2);
    for (int i = 0; i < 2; i++) {
        memset(pieces[i].data, 0x5a, 1000);
        pieces[i].len = 1000;
    }
    memcpy(pieces[0].data - NB_NET_HEADER_BYTES, &header, NB_NET_HEADER_BYTES);
    pieces[0].flags = (uint8_t)(NB_MORE | (flag ? NB_HEADER : 0));
    pieces[1].flags = NB_CONTINUATION;
    nb_client_send(&world->client, pieces, 2);
    nb_client_flush(&world->client);
    return pieces[0];
}

/* What the device reads in front of the frame. */
static struct net_header transmit_header(struct world *world)
{
    uint8_t frame[65536];
    uint32_t len;
    struct fake_chain chain;
    struct net_header header;
    CHECK(fake_collect(&world->device, &chain, frame, &len));
    CHECK_EQ(len, 2000);
    memcpy(&header, world->device.sent_header, sizeof(header));
    fake_complete(&world->device, &chain);
    return header;
}

static void accept(uint64_t offloads, struct net_header header, struct net_header expected)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_max_pieces = 34, .offloads = offloads});
    send_with_header(&world, header, true);
    world_pump_idle(&world);
    struct net_header seen = transmit_header(&world);
    CHECK_EQ(memcmp(&seen, &expected, sizeof(seen)), 0);
    world_pump_idle(&world);
    world_close(&world);
}

static void refuse(uint64_t offloads, struct net_header header)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_max_pieces = 34, .offloads = offloads});
    send_with_header(&world, header, true);
    world_expect_client_fault(&world, NB_REFUSE_HEADER);
    CHECK_EQ(fake_available(&world.device.tx), 0);
    world_close(&world);
}

/* The good header with another value in one field. */
#define ALTERED(field, value)                                                                                          \
    ({                                                                                                                 \
        struct net_header altered_ = TSO4;                                                                             \
        altered_.field = (value);                                                                                      \
        altered_;                                                                                                      \
    })

TEST(headers_that_were_agreed_to_reach_the_device)
{
    accept(ALL_TX, TSO4, TSO4);
    accept(OFFLOAD(NB_CSUM) | OFFLOAD(NB_HOST_TSO4), TSO4, TSO4);
    accept(ALL_TX, ALTERED(gso_type, NET_HDR_GSO_TCPV6), ALTERED(gso_type, NET_HDR_GSO_TCPV6));
    accept(ALL_TX, ALTERED(gso_type, NET_HDR_GSO_UDP_L4), ALTERED(gso_type, NET_HDR_GSO_UDP_L4));
    accept(ALL_TX, ALTERED(gso_type, NET_HDR_GSO_TCPV4 | NET_HDR_GSO_ECN),
           ALTERED(gso_type, NET_HDR_GSO_TCPV4 | NET_HDR_GSO_ECN));
    accept(ALL_TX, ALTERED(hdr_len, 2000), ALTERED(hdr_len, 2000));
    accept(ALL_TX, ALTERED(csum_start, 1982), ALTERED(csum_start, 1982));
}

/* What means nothing is not handed over; num_buffers is the device's word. */
TEST(fields_without_a_meaning_are_cleared)
{
    accept(ALL_TX, ALTERED(num_buffers, 7), TSO4);
    accept(ALL_TX, ALTERED(gso_type, NET_HDR_GSO_NONE),
           (struct net_header){.flags = NET_HDR_F_NEEDS_CSUM, .hdr_len = 54, .csum_start = 34, .csum_offset = 16});
    accept(ALL_TX, (struct net_header){.csum_start = 0xffff, .csum_offset = 0xffff, .gso_size = 9}, (struct net_header){0});
}

TEST(headers_that_ask_for_what_was_not_agreed)
{
    refuse(ALL_TX & ~OFFLOAD(NB_HOST_TSO4), TSO4);
    refuse(ALL_TX & ~OFFLOAD(NB_HOST_TSO6), ALTERED(gso_type, NET_HDR_GSO_TCPV6));
    refuse(ALL_TX & ~OFFLOAD(NB_HOST_USO), ALTERED(gso_type, NET_HDR_GSO_UDP_L4));
    refuse(ALL_TX & ~OFFLOAD(NB_HOST_ECN), ALTERED(gso_type, NET_HDR_GSO_TCPV4 | NET_HDR_GSO_ECN));
    refuse(ALL_TX & ~OFFLOAD(NB_CSUM), ALTERED(gso_type, NET_HDR_GSO_NONE));
}

TEST(headers_that_mean_nothing)
{
    refuse(ALL_TX, ALTERED(flags, 0)); /* segments without checksums */
    refuse(ALL_TX, ALTERED(flags, 3)); /* DATA_VALID is for received frames */
    refuse(ALL_TX, ALTERED(flags, 5)); /* RSC_INFO as well */
    refuse(ALL_TX, ALTERED(flags, 0xff));
    refuse(ALL_TX, ALTERED(gso_type, 2));
    refuse(ALL_TX, ALTERED(gso_type, 3)); /* UFO: never agreed */
    refuse(ALL_TX, ALTERED(gso_type, 6));
    refuse(ALL_TX, ALTERED(gso_type, 0x7f));
    refuse(ALL_TX, ALTERED(gso_type, NET_HDR_GSO_ECN));
    refuse(ALL_TX, ALTERED(gso_type, NET_HDR_GSO_UDP_L4 | NET_HDR_GSO_ECN));
    refuse(ALL_TX, ALTERED(gso_size, 0));
}

TEST(headers_that_reach_beyond_their_frame)
{
    refuse(ALL_TX, ALTERED(hdr_len, 2001));
    refuse(ALL_TX, ALTERED(hdr_len, 0xffff));
    refuse(ALL_TX, ALTERED(csum_start, 1983)); /* 1983 + 16 + 2 = 2001 */
    refuse(ALL_TX, ALTERED(csum_start, 0xffff));
    refuse(ALL_TX, ALTERED(csum_offset, 0xffff));
    struct net_header wraps = TSO4; /* to 0, in 16 bits */
    wraps.csum_start = 0xfff0;
    wraps.csum_offset = 0x0e;
    refuse(ALL_TX, wraps);
}

/* Without the flag it is not looked at, whatever is there, and the device reads zeroes. */
TEST(header_without_its_flag)
{
    struct world world;
    const struct net_header zeroes = {0};
    world_open(&world, (struct world_config){.tx_max_pieces = 34, .offloads = ALL_TX});
    for (int i = 0; i < 70; i++) {
        send_with_header(&world, TSO4, i % 2);
        world_pump_idle(&world);
        struct net_header seen = transmit_header(&world);
        CHECK_EQ(memcmp(&seen, i % 2 ? &TSO4 : &zeroes, sizeof(seen)), 0);
        world_pump_idle(&world);
    }
    world_close(&world);
}

/* A header in a continuation, and one where only reception has offloads. */
TEST(header_where_none_belongs)
{
    struct world world;
    struct nb_piece pieces[2];
    world_open(&world, (struct world_config){.offloads = RX_OFFLOADS});
    CHECK_EQ(nb_client_allocate(&world.client, pieces, 1), 1);
    pieces[0].len = 100;
    pieces[0].flags = NB_HEADER;
    nb_client_send(&world.client, pieces, 1);
    world_expect_client_fault(&world, NB_REFUSE_KIND);
    world_close(&world);

    world_open(&world, (struct world_config){.tx_max_pieces = 34, .offloads = ALL_TX});
    CHECK_EQ(nb_client_allocate(&world.client, pieces, 2), 2);
    pieces[0].len = pieces[1].len = 100;
    pieces[0].flags = NB_MORE;
    pieces[1].flags = NB_CONTINUATION | NB_HEADER;
    nb_client_send(&world.client, pieces, 2);
    world_expect_client_fault(&world, NB_REFUSE_KIND);
    world_close(&world);
}

struct scribbler {
    uint8_t *header;
    bool stop;
};

static void *scribble(void *argument)
{
    struct scribbler *scribbler = argument;
    while (!__atomic_load_n(&scribbler->stop, __ATOMIC_RELAXED)) {
        __atomic_store_n(&scribbler->header[1], (uint8_t)0x7f, __ATOMIC_RELAXED);
        __atomic_store_n(&scribbler->header[1], (uint8_t)NET_HDR_GSO_TCPV4, __ATOMIC_RELAXED);
    }
    return NULL;
}

/* The header changes while it is being sent: the device is given what was checked, or nothing. */
TEST(header_changes_after_publication)
{
    for (int i = 0; i < 50; i++) {
        struct world world;
        pthread_t thread;
        world_open(&world, (struct world_config){.tx_max_pieces = 34, .offloads = ALL_TX, .tx_count = 34, .rx_count = 4});
        struct nb_piece first = send_with_header(&world, TSO4, true);
        struct scribbler scribbler = {.header = first.data - NB_NET_HEADER_BYTES};
        CHECK_EQ(pthread_create(&thread, NULL, scribble, &scribbler), 0);
        struct nb_pump_result result = world_pump(&world);
        if (result.event == NB_EVENT_CONTROL) {
            struct net_header seen = transmit_header(&world);
            CHECK_EQ(memcmp(&seen, &TSO4, sizeof(seen)), 0);
            world_pump_idle(&world);
        } else {
            CHECK_EQ(result.event, NB_EVENT_CLIENT_FAULT);
            CHECK_EQ(result.detail, NB_REFUSE_HEADER);
            CHECK_EQ(fake_available(&world.device.tx), 0);
        }
        __atomic_store_n(&scribbler.stop, true, __ATOMIC_RELAXED);
        CHECK_EQ(pthread_join(thread, NULL), 0);
        world_close(&world);
    }
}

/* ---- Received frames ------------------------------------------------------------------------------------------ */

TEST(header_of_a_received_frame_is_handed_over)
{
    const struct net_header sent = {.flags = 2, .gso_type = NET_HDR_GSO_TCPV4, .hdr_len = 66, .gso_size = 1400};
    struct world world;
    struct nb_piece pieces[8];
    world_open(&world, (struct world_config){.max_pieces = 34, .offloads = OFFLOAD(NB_GUEST_CSUM)});
    memcpy(world.device.header, &sent, sizeof(sent));
    deliver(&world, 0, 60);
    deliver(&world, 1, 5000);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_receive(&world.client, pieces, 8), 4);
    CHECK_EQ(pieces[0].flags, NB_HEADER);
    CHECK_EQ(pieces[1].flags, NB_HEADER | NB_MORE);
    CHECK_EQ(pieces[2].flags, NB_MORE | NB_CONTINUATION);
    CHECK_EQ(pieces[3].flags, NB_CONTINUATION);
    for (int i = 0; i < 2; i++) {
        struct net_header seen, expected = sent;
        memcpy(&seen, pieces[i].data - NB_NET_HEADER_BYTES, sizeof(seen));
        expected.num_buffers = i ? 3 : 1;
        CHECK_EQ(memcmp(&seen, &expected, sizeof(seen)), 0);
    }
    world_close(&world);
}

TEST(no_header_is_told_of_without_offloads_on_the_receive_side)
{
    struct world world;
    world_open(&world, (struct world_config){.offloads = ALL_TX});
    deliver(&world, 0, 60);
    world_pump_idle(&world);
    receive_one(&world, 0, 60);
    world_close(&world);
}
