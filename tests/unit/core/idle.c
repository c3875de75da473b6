/* A pump with nothing to do sleeps: whatever keeps it from working, it burns no processor. */
#include "check.h"
#include "jitter.h"
#include "world.h"

#include <sys/eventfd.h>
#include <time.h>

/* Runs the pump for a tenth of a second of real time and fails if it was awake for more than a fifth of it. */
static void expect_sleep(struct world *world)
{
    world_start_pump(world);
    struct timespec tenth = {.tv_nsec = 100000000};
    nanosleep(&tenth, NULL);
    uint64_t sleeps = world->counters.sleeps;
    world_stop_pump(world);
    CHECK_EQ(world->result.event, NB_EVENT_CONTROL);
    if (world->pump_cpu_seconds > 0.02)
        FAIL("the pump was busy for %.0f ms of 100 and slept %llu times", world->pump_cpu_seconds * 1000,
             (unsigned long long)sleeps);
    world_close(world);
}

TEST(idle_with_nothing_to_do)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    expect_sleep(&world);
}

TEST(idle_after_a_short_poll)
{
    struct world world;
    world_open(&world, (struct world_config){.spin_ns = 1000000});
    expect_sleep(&world);
}

TEST(idle_while_the_tx_queue_is_full)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_size = 4});
    for (uint64_t i = 0; i < 64; i++)
        send_one(&world, i, 60);
    expect_sleep(&world);
}

TEST(idle_while_the_client_holds_every_rx_buffer)
{
    struct world world;
    world_open(&world, (struct world_config){.rx_count = 64});
    for (uint64_t i = 0; i < 64; i++)
        deliver(&world, i, 60);
    expect_sleep(&world);
}

TEST(idle_in_the_middle_of_a_merged_frame)
{
    struct world world;
    world_open(&world, (struct world_config){.max_pieces = 34});
    world.device.lie = FAKE_NUM_BUFFERS_NEVER_REACHED;
    deliver(&world, 0, 9000);
    expect_sleep(&world);
}

/* Doorbells that were rung and never read must not keep it awake. */
TEST(idle_after_many_doorbells)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    for (int i = 0; i < 100; i++) {
        world.client.tx_active.header->wake = 1;
        nb_client_flush(&world.client);
    }
    CHECK(is_rung(world.client_doorbell_fd));
    expect_sleep(&world);
}

/* An interrupt for which there is nothing to do any more. */
TEST(idle_after_interrupts)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    CHECK_EQ(eventfd_write(world.rx_irq_fd, 1), 0);
    CHECK_EQ(eventfd_write(world.tx_irq_fd, 1), 0);
    expect_sleep(&world);
}

TEST(idle_with_intx_after_a_spurious_interrupt)
{
    struct world world;
    world_open(&world, (struct world_config){.intx = true});
    world.device.isr_pending = 1;
    fake_intx_poll(&world.device);
    expect_sleep(&world);
}

static struct world *completing;

static void complete_one(void)
{
    before_epoll_wait = NULL;
    transmit_one(completing, 0, 60);
}

/* The last frame is sent at the moment in which its client goes: it counts. */
TEST(completions_that_come_with_a_control_event_count)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    send_one(&world, 0, 60);
    world_pump_idle(&world);
    completing = &world;
    before_epoll_wait = complete_one;
    world_pump_idle(&world);
    CHECK(before_epoll_wait == NULL);
    CHECK_EQ(world.counters.packets_tx, 1);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_DEVICE), 0);
    world_close(&world);
}
