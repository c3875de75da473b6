/* The tap service's loop, with a pair of datagram sockets for a TAP device: frames both ways in whatever pieces, and headers
 * from either side that are to go no further.
 */
#define _GNU_SOURCE
#include "check.h"
#include "jitter.h"
#include "net_header.h"
#include "world.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { LARGEST = 34 * ROOM, MOST = NB_NET_HEADER_BYTES + LARGEST + 1 };
#define ALL (TX_OFFLOADS | RX_OFFLOADS)

static const struct net_header NOTHING = {0};
static const struct net_header TSO4 = {.flags = NET_HDR_F_NEEDS_CSUM,
                                       .gso_type = NET_HDR_GSO_TCPV4,
                                       .hdr_len = 54,
                                       .gso_size = 1448,
                                       .csum_start = 34,
                                       .csum_offset = 16};
#define ALTERED(field, value)                                                                                          \
    ({                                                                                                                 \
        struct net_header altered_ = TSO4;                                                                             \
        altered_.field = (value);                                                                                      \
        altered_;                                                                                                      \
    })

/* A world with a TAP device: `kernel` is the kernel's end of it. */
struct tapped {
    struct world world;
    struct nb_tap tap;
    int kernel;
    int stop_fd; /* always readable: so nb_client_tap comes back when it is idle */
};

static void open_tapped(struct tapped *tapped, struct world_config config)
{
    int pair[2];
    if (config.max_pieces == 0)
        config.max_pieces = 34;
    if (config.tx_max_pieces == 0)
        config.tx_max_pieces = 34;
    world_open(&tapped->world, config);
    CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair), 0);
    tapped->tap = (struct nb_tap){.fd = pair[0]};
    tapped->kernel = pair[1];
    tapped->stop_fd = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC);
    CHECK(tapped->stop_fd >= 0);
}

static void close_tapped(struct tapped *tapped)
{
    close(tapped->kernel);
    close(tapped->tap.fd);
    close(tapped->stop_fd);
    world_close(&tapped->world);
}

static void run_idle(struct tapped *tapped)
{
    world_pump_idle(&tapped->world);
    CHECK_EQ(nb_client_tap(&tapped->world.client, &tapped->tap, tapped->stop_fd), 0);
    CHECK_EQ(tapped->tap.error, 0);
    world_pump_idle(&tapped->world);
}

/* What the kernel gets next is frame `number`, with this header. */
static void kernel_gets(struct tapped *tapped, uint64_t number, uint32_t len, struct net_header expected)
{
    static uint8_t got[MOST];
    struct net_header header;
    CHECK_EQ(recv(tapped->kernel, got, sizeof(got), 0), NB_NET_HEADER_BYTES + len);
    memcpy(&header, got, sizeof(header));
    CHECK_EQ(memcmp(&header, &expected, sizeof(header)), 0);
    CHECK(frame_is(got + NB_NET_HEADER_BYTES, number, len, false));
}

static void kernel_gets_nothing(struct tapped *tapped)
{
    uint8_t byte;
    CHECK(recv(tapped->kernel, &byte, 1, 0) < 0 && errno == EAGAIN);
}

static void kernel_sends(struct tapped *tapped, uint64_t number, uint32_t len, struct net_header header)
{
    static uint8_t frame[MOST];
    memcpy(frame, &header, sizeof(header));
    frame_make(frame + NB_NET_HEADER_BYTES, number, len);
    CHECK_EQ(send(tapped->kernel, frame, NB_NET_HEADER_BYTES + len, 0), NB_NET_HEADER_BYTES + len);
}

static void device_gets(struct tapped *tapped, uint64_t number, uint32_t len, struct net_header expected)
{
    static uint8_t frame[65536];
    uint32_t got;
    struct fake_chain chain;
    CHECK(fake_collect(&tapped->world.device, &chain, frame, &got));
    CHECK_EQ(got, len);
    CHECK(frame_is(frame, number, len, false));
    CHECK_EQ(memcmp(tapped->world.device.sent_header, &expected, sizeof(expected)), 0);
    fake_complete(&tapped->world.device, &chain);
}

static void device_sends(struct tapped *tapped, uint64_t number, uint32_t len, struct net_header header)
{
    memcpy(tapped->world.device.header, &header, sizeof(header));
    deliver(&tapped->world, number, len);
}

static const uint32_t LENGTHS[] = {SHORTEST, 60, 1514, ROOM - 1, ROOM, ROOM + 1, 2 * ROOM, 2 * ROOM + 1, 9014, 65535, 65536};
enum { KINDS = sizeof(LENGTHS) / sizeof(LENGTHS[0]) };

TEST(tap_frames_of_all_lengths_both_ways)
{
    struct tapped tapped;
    open_tapped(&tapped, (struct world_config){.offloads = ALL});
    for (uint32_t i = 0; i < 3 * KINDS; i++) {
        uint32_t len = LENGTHS[i % KINDS];
        struct net_header header = len > 1000 ? TSO4 : NOTHING;
        device_sends(&tapped, 2 * i, len, header);
        kernel_sends(&tapped, 2 * i + 1, len, header);
        run_idle(&tapped);
        kernel_gets(&tapped, 2 * i, len, header);
        device_gets(&tapped, 2 * i + 1, len, header);
        run_idle(&tapped);
    }
    CHECK_EQ(tapped.tap.frames_in, 3 * KINDS);
    CHECK_EQ(tapped.tap.frames_out, 3 * KINDS);
    CHECK_EQ(tapped.tap.bytes_in, tapped.tap.bytes_out);
    CHECK_EQ(tapped.tap.refused + tapped.tap.too_long + tapped.tap.bad_headers, 0);
    close_tapped(&tapped);
}

/* No headers at the port, and headers of zeroes at the TAP device. */
TEST(tap_without_offloads)
{
    struct tapped tapped;
    open_tapped(&tapped, (struct world_config){.tx_max_pieces = 5});
    for (uint64_t number = 0; number < 5; number++) {
        device_sends(&tapped, number, 9014, NOTHING);
        kernel_sends(&tapped, number, 9014, NOTHING);
    }
    run_idle(&tapped);
    for (uint64_t number = 0; number < 5; number++) {
        kernel_gets(&tapped, number, 9014, NOTHING);
        device_gets(&tapped, number, 9014, NOTHING);
    }
    run_idle(&tapped);
    close_tapped(&tapped);
}

static void device_lies(uint64_t offloads, struct net_header header)
{
    struct tapped tapped;
    open_tapped(&tapped, (struct world_config){.offloads = offloads});
    device_sends(&tapped, 0, 2000, header);
    device_sends(&tapped, 1, 2000, NOTHING);
    run_idle(&tapped);
    kernel_gets(&tapped, 1, 2000, NOTHING);
    kernel_gets_nothing(&tapped);
    CHECK_EQ(tapped.tap.bad_headers, 1);
    CHECK_EQ(tapped.tap.frames_in, 1);
    close_tapped(&tapped);
}

TEST(tap_headers_of_the_device_that_go_no_further)
{
    device_lies(ALL, ALTERED(gso_type, 2));
    device_lies(ALL, ALTERED(gso_type, 3)); /* UFO: never agreed */
    device_lies(ALL, ALTERED(gso_type, NET_HDR_GSO_ECN));
    device_lies(ALL, ALTERED(gso_type, NET_HDR_GSO_UDP_L4 | NET_HDR_GSO_ECN));
    device_lies(ALL, ALTERED(gso_size, 0));
    device_lies(ALL, ALTERED(hdr_len, 2001));
    device_lies(ALL, ALTERED(csum_start, 1983)); /* 1983 + 16 + 2 = 2001 */
    device_lies(ALL, ALTERED(csum_start, 0xffff));
    device_lies(ALL, ALTERED(csum_offset, 0xffff));
    device_lies(ALL & ~OFFLOAD(NB_GUEST_CSUM), TSO4);
    device_lies(ALL & ~OFFLOAD(NB_GUEST_CSUM), (struct net_header){.flags = NET_HDR_F_DATA_VALID});
    device_lies(ALL & ~OFFLOAD(NB_GUEST_TSO4), TSO4);
    device_lies(ALL & ~OFFLOAD(NB_GUEST_TSO6), ALTERED(gso_type, NET_HDR_GSO_TCPV6));
    device_lies(ALL & ~OFFLOAD(NB_GUEST_ECN), ALTERED(gso_type, NET_HDR_GSO_TCPV4 | NET_HDR_GSO_ECN));
    device_lies(ALL & ~(OFFLOAD(NB_GUEST_USO4) | OFFLOAD(NB_GUEST_USO6)), ALTERED(gso_type, NET_HDR_GSO_UDP_L4));
}

static void device_says(struct net_header header, struct net_header expected)
{
    struct tapped tapped;
    open_tapped(&tapped, (struct world_config){.offloads = ALL});
    device_sends(&tapped, 0, 2000, header);
    run_idle(&tapped);
    kernel_gets(&tapped, 0, 2000, expected);
    close_tapped(&tapped);
}

TEST(tap_headers_of_the_device_as_they_go_further)
{
    device_says(ALTERED(flags, 0xfd), TSO4); /* unknown flags are passed over */
    device_says(ALTERED(flags, 3), ALTERED(flags, 3));
    device_says(ALTERED(gso_type, NET_HDR_GSO_TCPV6), ALTERED(gso_type, NET_HDR_GSO_TCPV6));
    device_says(ALTERED(gso_type, NET_HDR_GSO_UDP_L4), ALTERED(gso_type, NET_HDR_GSO_UDP_L4));
    device_says((struct net_header){.flags = NET_HDR_F_DATA_VALID, .gso_size = 9, .csum_start = 0xffff},
                (struct net_header){.flags = NET_HDR_F_DATA_VALID});
}

/* The driver would end the session for it. */
static void kernel_lies(uint64_t offloads, struct net_header header)
{
    struct tapped tapped;
    open_tapped(&tapped, (struct world_config){.offloads = offloads});
    kernel_sends(&tapped, 0, 2000, header);
    kernel_sends(&tapped, 1, 2000, NOTHING);
    run_idle(&tapped);
    CHECK_EQ(fake_available(&tapped.world.device.tx), 1);
    device_gets(&tapped, 1, 2000, NOTHING);
    CHECK_EQ(tapped.tap.bad_headers, 1);
    CHECK_EQ(tapped.tap.frames_out, 1);
    run_idle(&tapped);
    close_tapped(&tapped);
}

TEST(tap_headers_of_the_kernel_that_go_no_further)
{
    kernel_lies(ALL & ~OFFLOAD(NB_HOST_TSO4), TSO4);
    kernel_lies(ALL & ~OFFLOAD(NB_CSUM), ALTERED(gso_type, NET_HDR_GSO_NONE));
    kernel_lies(RX_OFFLOADS, TSO4);
    kernel_lies(0, TSO4);
    kernel_lies(ALL, ALTERED(gso_type, 3));
    kernel_lies(ALL, ALTERED(gso_size, 0));
    kernel_lies(ALL, ALTERED(hdr_len, 2001));
    kernel_lies(ALL, ALTERED(csum_start, 1983));
}

/* A checksum that was looked at: nothing that a sender says. */
TEST(tap_data_valid_is_not_sent)
{
    struct tapped tapped;
    open_tapped(&tapped, (struct world_config){.offloads = ALL});
    kernel_sends(&tapped, 0, 2000, (struct net_header){.flags = NET_HDR_F_DATA_VALID});
    run_idle(&tapped);
    device_gets(&tapped, 0, 2000, NOTHING);
    run_idle(&tapped);
    CHECK_EQ(tapped.tap.frames_out, 1);
    close_tapped(&tapped);
}

TEST(tap_frames_that_are_too_long_are_left_out)
{
    struct tapped tapped;
    open_tapped(&tapped, (struct world_config){.tx_max_pieces = 5, .tx_largest_frame = 9022});
    kernel_sends(&tapped, 0, 9022, NOTHING);
    kernel_sends(&tapped, 1, 9023, NOTHING);
    kernel_sends(&tapped, 2, 5 * ROOM + 1, NOTHING);
    kernel_sends(&tapped, 3, LARGEST, NOTHING);
    kernel_sends(&tapped, 4, 60, NOTHING);
    run_idle(&tapped);
    device_gets(&tapped, 0, 9022, NOTHING);
    device_gets(&tapped, 4, 60, NOTHING);
    run_idle(&tapped);
    CHECK_EQ(tapped.tap.too_long, 3);
    CHECK_EQ(tapped.tap.frames_out, 2);
    close_tapped(&tapped);
}

/* As many buffers as the longest frame takes: frames wait in the TAP device, and none is cut. */
TEST(tap_with_few_buffers)
{
    struct tapped tapped;
    open_tapped(&tapped, (struct world_config){.offloads = ALL, .tx_count = 34, .rx_count = 40, .rx_size = 64});
    for (uint64_t number = 0; number < 6; number++) {
        kernel_sends(&tapped, number, number % 2 ? 60 : 65535, number % 2 ? NOTHING : TSO4);
    }
    for (uint64_t number = 0; number < 6; number++) {
        run_idle(&tapped);
        device_gets(&tapped, number, number % 2 ? 60 : 65535, number % 2 ? NOTHING : TSO4);
    }
    run_idle(&tapped);
    CHECK_EQ(tapped.tap.frames_out, 6);
    close_tapped(&tapped);
}

/* A frame whose end has not come when the loop comes back for something else. */
TEST(tap_keeps_the_beginning_of_a_frame)
{
    struct tapped tapped;
    uint8_t frame[5000];
    open_tapped(&tapped, (struct world_config){.offloads = ALL, .burst = 1});
    frame_make(frame, 0, sizeof(frame));
    device_sends(&tapped, 0, sizeof(frame), NOTHING);
    world_pump_idle(&tapped.world);
    struct nb_ring_header *ring = tapped.world.client.rx_active.header;
    uint32_t produced = ring->produced;
    for (uint32_t shown = produced - 3; shown != produced + 1; shown++) {
        forge_produced(&tapped.world, RX_ACTIVE, shown);
        kernel_gets_nothing(&tapped);
        CHECK_EQ(nb_client_tap(&tapped.world.client, &tapped.tap, tapped.stop_fd), 0);
    }
    kernel_gets(&tapped, 0, sizeof(frame), NOTHING);
    run_idle(&tapped);
    close_tapped(&tapped);
}

TEST(tap_device_that_is_gone)
{
    struct tapped tapped;
    open_tapped(&tapped, (struct world_config){.offloads = ALL});
    close(tapped.kernel);
    tapped.kernel = -1;
    device_sends(&tapped, 0, 60, NOTHING);
    world_pump_idle(&tapped.world);
    CHECK_EQ(nb_client_tap(&tapped.world.client, &tapped.tap, tapped.stop_fd), -2);
    CHECK(tapped.tap.error == ECONNREFUSED || tapped.tap.error == ENOTCONN || tapped.tap.error == EPIPE);
    close_tapped(&tapped);
}

/* ---- Asleep: each of these is called when the loop is about to sleep ------------------------------------------- */

static struct tapped *asleep;

static void work_until_stopped(struct tapped *tapped, void (*when_asleep)(void))
{
    eventfd_t value;
    CHECK_EQ(eventfd_read(tapped->stop_fd, &value), 0);
    asleep = tapped;
    before_epoll_wait = when_asleep;
    CHECK_EQ(nb_client_tap(&tapped->world.client, &tapped->tap, tapped->stop_fd), 0);
    before_epoll_wait = NULL;
}

static void expect_peace_and_stop(void)
{
    CHECK(!is_rung(asleep->world.client.wait_fd));
    CHECK_EQ(eventfd_write(asleep->stop_fd, 1), 0);
}

static void expect_to_be_heard_and_stop(void)
{
    CHECK(!is_rung(asleep->world.client.wait_fd));
    kernel_sends(asleep, 2, 60, NOTHING);
    CHECK(is_rung(asleep->world.client.wait_fd));
    CHECK_EQ(eventfd_write(asleep->stop_fd, 1), 0);
}

static void expect_peace_and_give_buffers(void)
{
    CHECK(!is_rung(asleep->world.client.wait_fd));
    nb_client_unallocate(&asleep->world.client, 64);
    CHECK_EQ(eventfd_write(asleep->world.driver_doorbell_fd, 1), 0);
    before_epoll_wait = expect_to_be_heard_and_stop;
}

/* What waits in the TAP device is no reason to wake before there are buffers to read it into. */
TEST(tap_device_is_heard_while_there_are_buffers)
{
    struct tapped tapped;
    struct nb_piece all[64];
    open_tapped(&tapped, (struct world_config){.offloads = ALL});
    CHECK_EQ(nb_client_allocate(&tapped.world.client, all, 64), 64);
    kernel_sends(&tapped, 1, 60, NOTHING);
    work_until_stopped(&tapped, expect_peace_and_give_buffers);
    world_pump_idle(&tapped.world);
    device_gets(&tapped, 1, 60, NOTHING);
    device_gets(&tapped, 2, 60, NOTHING);
    world_pump_idle(&tapped.world);
    close_tapped(&tapped);
}

/* Nor is a device that is gone, of which epoll tells unasked. */
TEST(tap_device_that_is_gone_while_there_are_no_buffers)
{
    struct tapped tapped;
    struct nb_piece all[64];
    open_tapped(&tapped, (struct world_config){.offloads = ALL});
    CHECK_EQ(nb_client_allocate(&tapped.world.client, all, 64), 64);
    CHECK_EQ(shutdown(tapped.tap.fd, SHUT_RDWR), 0);
    work_until_stopped(&tapped, expect_peace_and_stop);
    close_tapped(&tapped);
}
