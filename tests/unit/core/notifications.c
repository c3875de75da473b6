/* When the device is notified: what it asked for, also where it asked in a way that the specification does not foresee.
 *
 * A device that sleeps asks for a notification at the position it has come to, then looks at the ring once more. What it
 * finds there was published while it asked for none. By the letter of the specification it has to ask anew before it
 * sleeps; QEMU does not in two places, and waits for ever for a driver that goes by the letter.
 */
#include "check.h"
#include "traffic.h"
#include "world.h"

enum { FRAMES = 5 };

static void take_and_complete(struct world *world, uint64_t first, uint64_t frames)
{
    for (uint64_t i = first; i < first + frames; i++)
        transmit_one(world, i, 60);
}

static void send(struct world *world, uint64_t first, uint64_t frames)
{
    for (uint64_t i = first; i < first + frames; i++)
        send_one(world, i, 60);
    world_pump_idle(world);
}

/* QEMU, virtio_net_tx_complete on a packed ring: its wire was full, and has room again. It asks, then sends what there is,
 * and the position where it asked stays behind. */
TEST(device_that_takes_more_after_it_asked)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    fake_want_notifications(&world.device.tx, false);
    send(&world, 0, FRAMES);
    fake_want_notifications(&world.device.tx, true);
    CHECK(!fake_notified(&world.device.tx));
    take_and_complete(&world, 0, FRAMES);
    send(&world, FRAMES, 1);
    CHECK(fake_notified(&world.device.tx));
    take_and_complete(&world, FRAMES, 1);
    world_pump_idle(&world);
    world_close(&world);
}

static void ask_twice_at_the_same_position(struct world *world)
{
    fake_want_notifications(&world->device.tx, false);
    send(world, 0, FRAMES - 1);
    fake_want_notifications(&world->device.tx, true);
    send(world, FRAMES - 1, 1);
    CHECK(fake_notified(&world->device.tx));
    fake_want_notifications(&world->device.tx, false);
    fake_want_notifications(&world->device.tx, true);
}

/* The same, and a notification of that position came while the wire was full, which made no difference: virtio_net_tx_bh
 * asks for notifications, finds a frame under way and wants none after all. */
TEST(device_that_missed_a_notification_while_it_was_busy)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    ask_twice_at_the_same_position(&world);
    take_and_complete(&world, 0, FRAMES);
    if (world.config.ring.packed || !world.config.ring.event_idx) { /* a split ring's position moves on with each frame */
        send(&world, FRAMES, 1);
        CHECK(fake_notified(&world.device.tx));
        take_and_complete(&world, FRAMES, 1);
    }
    world_pump_idle(&world);
    world_close(&world);
}

/* The same, and the frame that it does not see is there before the driver sees that it has used others. */
TEST(device_that_sleeps_on_a_frame)
{
    struct world world;
    struct fake_chain chains[FRAMES];
    uint8_t frame[65536];
    uint32_t len;
    world_open(&world, (struct world_config){0});
    ask_twice_at_the_same_position(&world);
    for (int i = 0; i < FRAMES; i++)
        CHECK(fake_collect(&world.device, &chains[i], frame, &len));
    send(&world, FRAMES, 1);
    if (world.config.ring.packed && world.config.ring.event_idx)
        CHECK(!fake_notified(&world.device.tx));
    for (int i = 0; i < FRAMES; i++)
        fake_complete(&world.device, &chains[i]);
    world_pump_idle(&world);
    CHECK(fake_notified(&world.device.tx) || !world.config.ring.packed);
    take_and_complete(&world, FRAMES, 1);
    world_pump_idle(&world);
    world_close(&world);
}

/* QEMU before 9.1, virtio_net_has_buffers: a frame needs more buffers than there are. It asks, finds some on its second
 * look, and still too few. */
TEST(device_that_finds_too_few_buffers_after_it_asked)
{
    struct world world;
    struct nb_piece pieces[8];
    world_open(&world, (struct world_config){.rx_size = 8, .rx_count = 8, .max_pieces = 5});
    fake_want_notifications(&world.device.rx, false);
    for (uint64_t i = 0; i < 8; i++)
        deliver(&world, i, 60);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_receive(&world.client, pieces, 8), 8);
    nb_client_release(&world.client, pieces, 2);
    world_pump_idle(&world);
    fake_want_notifications(&world.device.rx, true);
    CHECK_EQ(fake_available(&world.device.rx), 2);
    CHECK(!fake_notified(&world.device.rx));
    nb_client_release(&world.client, pieces + 2, 6);
    world_pump_idle(&world);
    CHECK(fake_notified(&world.device.rx));
    world_close(&world);
}

/* Asked once, told once: a device that is slow to wake up is not told again meanwhile. */
TEST(one_wish_is_one_notification)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    if (!world.config.ring.event_idx) { /* there, a wish lasts until it is withdrawn */
        world_close(&world);
        return;
    }
    fake_want_notifications(&world.device.tx, false);
    send(&world, 0, FRAMES);
    take_and_complete(&world, 0, FRAMES);
    fake_want_notifications(&world.device.tx, true);
    uint64_t sent = world.counters.notifications_sent;
    for (uint64_t i = FRAMES; i < 4 * FRAMES; i++) {
        send(&world, i, 1);
        CHECK_EQ(world.counters.notifications_sent, sent + 1);
    }
    take_and_complete(&world, FRAMES, 3 * FRAMES);
    world_pump_idle(&world);
    world_close(&world);
}

/* A device that polls for some laps of the ring, then asks: what was not told it for so long is no reason to forget. */
TEST(device_that_polls_is_left_alone_and_then_told)
{
    struct world world;
    const uint64_t laps = 5 * 64;
    world_open(&world, (struct world_config){.tx_size = 64});
    world_pump_idle(&world);
    fake_want_notifications(&world.device.tx, false);
    uint64_t sent = world.counters.notifications_sent;
    for (uint64_t i = 0; i < laps; i++) {
        send(&world, i, 1);
        take_and_complete(&world, i, 1);
        /* On a split ring a device can only ask for a position that has gone by: one that it was never told of. */
        CHECK(world.counters.notifications_sent <= sent + (world.config.ring.event_idx && !world.config.ring.packed));
    }
    for (int round = 0; round < 3; round++) {
        fake_want_notifications(&world.device.tx, true);
        send(&world, laps + (uint64_t)round, 1);
        CHECK(fake_notified(&world.device.tx));
        take_and_complete(&world, laps + (uint64_t)round, 1);
    }
    world_pump_idle(&world);
    world_close(&world);
}
