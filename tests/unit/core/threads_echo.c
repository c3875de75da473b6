/* End to end in three threads: fake device, pump, echo client. Every frame byte for byte, every count exact. */
#include "check.h"
#include "jitter.h"
#include "traffic.h"

/* Under ThreadSanitizer everything takes ten times as long. */
#if defined(__SANITIZE_THREAD__)
enum { SHARE = 10 };
#else
enum { SHARE = 1 };
#endif

static void turn_delays_on(void)
{
    jitter_every = 3;
    /* ThreadSanitizer would take a store for later than it is. */
    stores_are_late = SHARE == 1;
}

static void echo_through(struct world_config config, struct traffic_config traffic)
{
    struct world world;
    world_open(&world, config);
    traffic.frames = traffic.frames * check_times() / SHARE;
    traffic_echo(&world, traffic);
    world_close(&world);
}

TEST(echo_of_every_length_in_bursts)
{
    echo_through((struct world_config){0}, (struct traffic_config){.frames = 6000, .window = 60, .burst = 16});
}

/* Half of the frames are copied, half are not, in whatever order they come. */
TEST(echo_with_short_frames_copied)
{
    echo_through((struct world_config){.tx_copied = NB_TX_MOST_COPIED},
                 (struct traffic_config){.frames = 6000, .window = 60, .burst = 16, .scrambled = true});
}

/* The echo changes frames where they are and forwards them; it has no TX buffer that would do. */
TEST(echo_that_forwards)
{
    echo_through((struct world_config){.rx_writable = true, .tx_copied = NB_TX_MOST_COPIED},
                 (struct traffic_config){.frames = 6000, .window = 60, .burst = 16, .scrambled = true});
    echo_through((struct world_config){.rx_writable = true},
                 (struct traffic_config){.frames = 6000, .window = 60, .burst = 16});
}

TEST(echo_that_forwards_with_queues_shorter_than_the_burst)
{
    echo_through((struct world_config){.rx_writable = true, .rx_size = 4, .tx_size = 4, .rx_count = 32, .tx_count = 1},
                 (struct traffic_config){.frames = 5000, .window = 30, .burst = 30});
}

TEST(echo_of_every_length_with_intx)
{
    echo_through((struct world_config){.intx = true}, (struct traffic_config){.frames = 6000, .window = 60, .burst = 16});
}

TEST(echo_with_completions_out_of_order)
{
    echo_through((struct world_config){0},
                 (struct traffic_config){.frames = 6000, .window = 60, .burst = 64, .scrambled = true});
}

TEST(echo_with_one_vector_for_both_queues)
{
    echo_through((struct world_config){.one_vector = true}, (struct traffic_config){.frames = 3000, .window = 20, .burst = 4});
}

TEST(echo_while_polling)
{
    echo_through((struct world_config){.spin_ns = 50000}, (struct traffic_config){.frames = 6000, .window = 60, .burst = 16});
}

/* As on a machine with one processor, where whoever waits lets the others run. */
TEST(echo_while_yielding)
{
    echo_through((struct world_config){.yields = true}, (struct traffic_config){.frames = 6000, .window = 60, .burst = 16});
    echo_through((struct world_config){.yields = true, .spin_ns = 50000},
                 (struct traffic_config){.frames = 6000, .window = 60, .burst = 16});
}

/* The client has the driver's eventfd, not an epoll instance around it. */
TEST(echo_with_a_bare_doorbell)
{
    echo_through((struct world_config){.doorbell_is_bare = true},
                 (struct traffic_config){.frames = 5000, .window = 20, .burst = 4});
}

TEST(echo_over_more_frames_than_a_ring_index_counts)
{
    echo_through((struct world_config){0},
                 (struct traffic_config){.frames = 210000, .window = 64, .burst = 64, .fixed_length = SHORTEST});
}

TEST(echo_across_the_wrap_of_the_port_ring_counts)
{
    echo_through((struct world_config){.ring_position = UINT32_MAX - 500, .queue_index = UINT16_MAX - 100},
                 (struct traffic_config){.frames = 6000, .window = 60, .burst = 16});
}

/* The client waits for a TX buffer again and again. */
TEST(echo_with_a_single_tx_buffer)
{
    echo_through((struct world_config){.tx_count = 1, .tx_size = 2},
                 (struct traffic_config){.frames = 3000, .window = 8, .burst = 4});
}

/* Frames wait in tx_active for room in the TX queue, and the device for RX buffers. */
TEST(echo_with_queues_shorter_than_the_burst)
{
    echo_through((struct world_config){.rx_size = 4, .tx_size = 4, .rx_count = 32, .tx_count = 32},
                 (struct traffic_config){.frames = 5000, .window = 30, .burst = 30});
}

TEST(echo_with_a_single_rx_buffer)
{
    echo_through((struct world_config){.rx_size = 1, .rx_count = 1}, (struct traffic_config){.frames = 3000, .window = 1});
}

/* Buffer counts that are no powers of two. */
TEST(echo_with_odd_buffer_counts)
{
    echo_through((struct world_config){.rx_count = 77, .tx_count = 13},
                 (struct traffic_config){.frames = 5000, .window = 40, .burst = 7});
}

/* Frames are dropped for want of a faster client, counted, and nothing stalls. */
TEST(echo_with_a_client_slower_than_the_wire)
{
    echo_through((struct world_config){.client_limit = 5},
                 (struct traffic_config){.frames = 10000, .burst = 64, .lossy = true});
}

/* One frame at a time: every hop goes to sleep and must be woken. */
TEST(ping_pong_never_loses_a_wake_up)
{
    echo_through((struct world_config){0}, (struct traffic_config){.frames = 5000, .fixed_length = 60});
}

TEST(ping_pong_never_loses_a_wake_up_with_intx)
{
    echo_through((struct world_config){.intx = true}, (struct traffic_config){.frames = 3000, .fixed_length = 60});
}

/* lost wake-up between re-arm and sleep: the windows stretched at random, on every side. */
TEST(no_wake_up_is_lost_with_delays_at_every_fence)
{
    turn_delays_on();
    echo_through((struct world_config){0},
                 (struct traffic_config){.frames = 5000, .window = 2, .fixed_length = 60, .delays = true});
}

TEST(no_wake_up_is_lost_with_delays_and_intx)
{
    turn_delays_on();
    echo_through((struct world_config){.intx = true},
                 (struct traffic_config){.frames = 3000, .window = 2, .fixed_length = 60, .delays = true});
}

TEST(no_wake_up_is_lost_with_delays_and_few_buffers)
{
    turn_delays_on();
    echo_through((struct world_config){.rx_size = 2, .tx_size = 2, .rx_count = 2, .tx_count = 1},
                 (struct traffic_config){.frames = 3000, .window = 3, .burst = 2, .fixed_length = 60, .delays = true});
}

/* The device is short of buffers, and what it waits for comes back by itself when it has sent something. */
TEST(no_wake_up_is_lost_with_delays_while_forwarding)
{
    turn_delays_on();
    echo_through((struct world_config){.rx_writable = true, .rx_size = 2, .tx_size = 2, .rx_count = 2, .tx_count = 1},
                 (struct traffic_config){.frames = 3000, .window = 3, .burst = 2, .fixed_length = 60, .delays = true});
}

/* The same, and it comes back at once. */
TEST(no_wake_up_is_lost_with_delays_while_copies_are_forwarded)
{
    turn_delays_on();
    echo_through((struct world_config){.rx_writable = true,
                                       .tx_copied = NB_TX_MOST_COPIED,
                                       .rx_size = 2,
                                       .tx_size = 2,
                                       .rx_count = 2,
                                       .tx_count = 1},
                 (struct traffic_config){.frames = 3000, .window = 3, .burst = 2, .fixed_length = 60, .delays = true});
}
