/* How fast the core moves frames with nothing else in the way: fake device, pump and echo client, without sanitizers.
 *
 * "stepwise" takes turns in one thread and times the pump alone, so its figure is the pump's cost whatever the number of
 * processors; one call of the pump, with its system call, is shared by a burst. "threads" is all three at once, and needs
 * three processors to mean much. Run by core_throughput.py; `core-throughput [FRAMES [LENGTH]]` by hand, under a profiler.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>

#include "check.h"
#include "traffic.h"
#include "world.h"

static const struct world_config CONFIG = {.rx_size = 256, .tx_size = 512, .rx_count = 1024, .tx_count = 512};

struct cost {
    double pump;
    double all;
};

/* Seconds a frame there and back. */
static struct cost move(struct world *world, uint64_t frames, uint32_t len, unsigned burst)
{
    uint8_t frame[65536] = {0};
    uint32_t sent;
    struct fake_chain chain;
    struct nb_pump_result result;
    struct nb_echo_counts counts = {0};
    double pump = 0, begin = seconds_now();
    for (uint64_t moved = 0; moved < frames; moved += burst) {
        for (unsigned i = 0; i < burst; i++)
            fake_deliver(&world->device, frame, len);
        double before = seconds_now();
        nb_pump_run(world->pump, &result);
        pump += seconds_now() - before;
        CHECK_EQ(nb_client_echo(&world->client, world->client_control_fd, &counts), 0);
        before = seconds_now();
        nb_pump_run(world->pump, &result);
        pump += seconds_now() - before;
        while (fake_collect(&world->device, &chain, frame, &sent))
            fake_complete(&world->device, &chain);
    }
    CHECK_EQ(counts.frames, (frames + burst - 1) / burst * burst);
    return (struct cost){pump / (double)counts.frames, (seconds_now() - begin) / (double)counts.frames};
}

/* The best of many short runs: what disturbs one does not disturb all. */
static void stepwise(uint64_t frames, uint32_t len, unsigned burst)
{
    enum { RUNS = 20 };
    struct world world;
    struct cost best = {1, 1};
    world_open(&world, CONFIG);
    /* Whoever finds nothing to do looks at its control fd, and comes back. */
    CHECK_EQ(eventfd_write(world.control_fd, 1), 0);
    CHECK_EQ(eventfd_write(world.client_control_fd, 1), 0);
    for (int i = 0; i < RUNS; i++) {
        struct cost cost = move(&world, frames / RUNS + 1, len, burst);
        best.pump = cost.pump < best.pump ? cost.pump : best.pump;
        best.all = cost.all < best.all ? cost.all : best.all;
    }
    printf("stepwise, burst %3u: pump %6.1f ns a frame there and back (%5.2f Mpps), all parties %6.1f ns\n", burst,
           best.pump * 1e9, 1e-6 / best.pump, best.all * 1e9);
    world_close(&world);
}

static void threads(uint64_t frames, uint32_t len, uint32_t spin_ns)
{
    struct world world;
    struct world_config config = CONFIG;
    config.spin_ns = spin_ns;
    world_open(&world, config);
    double begin = seconds_now();
    traffic_echo(&world, (struct traffic_config){.frames = frames, .window = 256, .burst = 32, .fixed_length = len, .unchecked = true});
    double seconds = seconds_now() - begin;
    const struct nb_counters *counters = &world.counters;
    printf("threads, polling %2u us: %6.2f Mpps there and back; %.1f frames a sleep, %.1f a wake-up sent, %.1f a notification\n",
           spin_ns / 1000, (double)frames / seconds / 1e6, (double)frames / (double)(counters->sleeps + 1),
           (double)frames / (double)(counters->wakeups_sent + 1), (double)frames / (double)(counters->notifications_sent + 1));
    world_close(&world);
}

int main(int argc, char **argv)
{
    uint64_t frames = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000000;
    uint32_t len = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 60;
    if (frames == 0 || len < SHORTEST || len > ROOM) {
        fprintf(stderr, "usage: %s [FRAMES [LENGTH]], LENGTH from %d to %d\n", argv[0], SHORTEST, ROOM);
        return 2;
    }
    stepwise(frames / 10 + 1, len, 1);
    stepwise(frames, len, 32);
    stepwise(frames, len, 256);
    threads(frames, len, 0);
    threads(frames, len, 50000);
    return 0;
}
