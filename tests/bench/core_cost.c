/* What the pump costs, with a fake device and an echo client: without sanitizers, and without anybody's driver or guest.
 *
 *     core_cost steps FRAMES LENGTH BURST QUEUE BUFFERS PAIRS FORWARDS
 *     core_cost load FRAMES_A_SECOND MILLISECONDS
 *
 * steps: there and back in one thread, burst by burst; FORWARDS is 1 for an echo that sends frames from where they are, 0 for
 * one that copies them. load: the pump in a thread, frames in bursts of 32, evenly spaced.
 *
 * Prints nanoseconds of the pump a frame, and the process's resident memory in KiB after a hundredth of the frames and at
 * the end; for load, the processor time that the pump's thread took, as a share of one, and frames a second. Under callgrind
 * with --toggle-collect=nb_pump_run the first form counts the pump's instructions and nothing else.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "world.h"

enum { LOAD_BURST = 32, LOAD_LENGTH = 64, MOST_BURSTS = 8 };

static long resident_kib(void)
{
    long pages = 0;
    FILE *statm = fopen("/proc/self/statm", "r");
    CHECK(statm != NULL);
    CHECK_EQ(fscanf(statm, "%*s %ld", &pages), 1);
    fclose(statm);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static struct fake_device *device_of(struct world *world, uint32_t pair)
{
    return pair == 0 ? &world->device : &world->more[pair - 1].device;
}

/* Gives back what the driver has sent; of every pair. */
static void complete_all(struct world *world)
{
    static uint8_t frame[65536];
    uint32_t sent;
    struct fake_chain chain;
    for (uint32_t pair = 0; pair < world->config.pairs; pair++)
        while (fake_collect(device_of(world, pair), &chain, frame, &sent))
            fake_complete(device_of(world, pair), &chain);
}

static double pump(struct world *world)
{
    struct nb_pump_result result;
    double before = seconds_now();
    nb_pump_run(world->pump, &result);
    return seconds_now() - before;
}

static void steps(uint64_t frames, uint32_t length, uint32_t burst, struct world_config config)
{
    static uint8_t frame[65536];
    struct world world;
    struct nb_echo_counts counts = {0};
    double spent = 0;
    long early = 0;
    world_open(&world, config);
    /* Whoever finds nothing to do looks at its control fd, and comes back. */
    CHECK_EQ(eventfd_write(world.control_fd, 1), 0);
    CHECK_EQ(eventfd_write(world.client_control_fd, 1), 0);
    for (uint64_t moved = 0; moved < frames; moved += burst) {
        for (uint32_t i = 0; i < burst; i++)
            fake_deliver(device_of(&world, i % config.pairs), frame, length);
        spent += pump(&world);
        CHECK_EQ(nb_client_echo(&world.client, world.client_control_fd, &counts), 0);
        spent += pump(&world);
        complete_all(&world);
        if (!early && moved >= frames / 100)
            early = resident_kib();
    }
    CHECK_EQ(counts.frames, (frames + burst - 1) / burst * burst);
    printf("%.2f %ld %ld\n", spent * 1e9 / (double)counts.frames, early, resident_kib());
    world_close(&world);
}

static void load(uint64_t rate, uint64_t milliseconds)
{
    static uint8_t frame[65536];
    struct world world;
    struct nb_echo_counts counts = {0};
    world_open(&world, (struct world_config){.rx_size = 256, .tx_size = 256, .rx_count = 1024, .tx_count = 512, .tx_copied = NB_TX_MOST_COPIED});
    CHECK_EQ(eventfd_write(world.client_control_fd, 1), 0);
    double begin = seconds_now(), end = begin + (double)milliseconds / 1e3;
    uint64_t offered = 0;
    world_start_pump(&world);
    while (seconds_now() < end) {
        uint64_t due = (uint64_t)((seconds_now() - begin) * (double)rate);
        /* A few at a time: more than the driver has buffers for it never sees. */
        for (int bursts = 0; bursts < MOST_BURSTS && offered + LOAD_BURST <= due; bursts++, offered += LOAD_BURST)
            for (int i = 0; i < LOAD_BURST && fake_deliver(&world.device, frame, LOAD_LENGTH); i++)
                ;
        if (rate)
            fake_interrupt(&world.device, &world.device.rx);
        CHECK_EQ(nb_client_echo(&world.client, world.client_control_fd, &counts), 0);
        complete_all(&world);
        struct timespec pause = {.tv_nsec = rate ? 50000 : 20000000};
        if (offered + LOAD_BURST > due)
            nanosleep(&pause, NULL);
    }
    double seconds = seconds_now() - begin;
    world_stop_pump(&world);
    printf("%.5f %.0f\n", world.pump_cpu_seconds / seconds, (double)counts.frames / seconds);
    world_discard(&world);
}

int main(int argc, char **argv)
{
    uint64_t number[9] = {0};
    for (int i = 2; i < argc && i < 9; i++)
        number[i] = strtoull(argv[i], NULL, 10);
    if (argc == 9 && !strcmp(argv[1], "steps") && number[2] && number[4] && number[7] && number[7] <= NB_MOST_PAIRS)
        steps(number[2], (uint32_t)number[3], (uint32_t)number[4],
              (struct world_config){.rx_size = (uint16_t)number[5],
                                    .tx_size = (uint16_t)(2 * number[5]), /* a frame may take two */
                                    .rx_count = (uint32_t)number[6],
                                    .tx_count = (uint32_t)number[6] / 2,
                                    .pairs = (uint32_t)number[7],
                                    .rx_writable = number[8] != 0,
                                    .tx_copied = NB_TX_MOST_COPIED});
    else if (argc == 4 && !strcmp(argv[1], "load"))
        load(number[2], number[3]);
    else
        return fprintf(stderr, "usage: core_cost steps FRAMES LENGTH BURST QUEUE BUFFERS PAIRS FORWARDS\n"
                               "       core_cost load RATE MILLISECONDS\n"), 2;
    return 0;
}
