/* What a client sleeps in: an epoll instance of its own, with the doorbell and whatever else it watches. */
#include "check.h"
#include "jitter.h"
#include "world.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

static unsigned client_waits;

static void count_wait(void) { client_waits++; }

TEST(wait_for_nothing_times_out)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    CHECK_EQ(nb_client_wait(&world.client, NB_WAIT_RECEIVE, 0), 0);
    CHECK_EQ(nb_client_watch(&world.client, world.client_control_fd), -1);
    CHECK_EQ(nb_client_wait(&world.client, NB_WAIT_RECEIVE | NB_WAIT_CONTROL, 5), 0);
    CHECK_EQ(world.client.rx_active.header->wake, 0);
    world_close(&world);
}

TEST(wait_finds_everything_that_is_there)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    deliver(&world, 0, 60);
    world_pump_idle(&world);
    CHECK_EQ(eventfd_write(world.client_control_fd, 1), 0);
    int all = NB_WAIT_RECEIVE | NB_WAIT_ALLOCATE | NB_WAIT_CONTROL;
    CHECK_EQ(nb_client_watch(&world.client, world.client_control_fd), -1);
    CHECK_EQ(nb_client_wait(&world.client, all, -1), all);
    CHECK_EQ(nb_client_watch(&world.client, -1), world.client_control_fd);
    CHECK_EQ(nb_client_wait(&world.client, NB_WAIT_ALLOCATE, -1), NB_WAIT_ALLOCATE);
    CHECK_EQ(world.client.rx_active.header->wake, 0);
    CHECK_EQ(world.client.tx_done.header->wake, 0);
    world_close(&world);
}

/* A doorbell left over from an earlier sleep must not end a wait that has no end; nor any later one. */
TEST(wait_is_not_ended_by_an_old_doorbell)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    CHECK_EQ(eventfd_write(world.driver_doorbell_fd, 1), 0);
    CHECK_EQ(eventfd_write(world.client_control_fd, 1), 0);
    CHECK_EQ(nb_client_watch(&world.client, world.client_control_fd), -1);
    CHECK_EQ(nb_client_wait(&world.client, NB_WAIT_RECEIVE | NB_WAIT_CONTROL, -1), NB_WAIT_CONTROL);
    CHECK_EQ(nb_client_watch(&world.client, -1), world.client_control_fd);
    client_waits = 0;
    before_epoll_wait = count_wait;
    CHECK_EQ(nb_client_wait(&world.client, NB_WAIT_RECEIVE, 5), 0);
    before_epoll_wait = NULL;
    CHECK_EQ(client_waits, 1);
    world_close(&world);
}

/* Every ring is heard, though nobody ever reads the doorbell: one that came while its client was awake, too. */
TEST(every_ring_of_the_doorbell_ends_a_wait)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    for (int i = 0; i < 3; i++) {
        deliver(&world, (uint64_t)i, 60);
        CHECK_EQ(nb_client_wait(&world.client, NB_WAIT_RECEIVE, 0), 0);
        __atomic_store_n(&world.client.rx_active.header->wake, 1, __ATOMIC_RELAXED); /* asleep */
        world_pump_idle(&world);
        struct epoll_event event;
        CHECK_EQ(epoll_wait(world.client.wait_fd, &event, 1, 0), 1);
        receive_one(&world, (uint64_t)i, 60);
    }
    world_discard(&world);
}

/* The caller's own fd ends its waits again, and what ended the loop no longer does. */
static void expect_to_watch_as_before(struct world *world)
{
    CHECK_EQ(nb_client_wait(&world->client, NB_WAIT_CONTROL, 0), 0);
    CHECK_EQ(eventfd_write(world->client_control_fd, 1), 0);
    CHECK_EQ(nb_client_wait(&world->client, NB_WAIT_CONTROL, 0), NB_WAIT_CONTROL);
    eventfd_t value;
    CHECK_EQ(eventfd_read(world->client_control_fd, &value), 0);
}

TEST(a_loop_leaves_what_its_caller_watches)
{
    struct world world;
    struct nb_echo_counts counts = {0};
    struct nb_tap tap = {.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)}; /* readable never */
    int stop_fd = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC);
    CHECK(tap.fd >= 0 && stop_fd >= 0);
    world_open(&world, (struct world_config){0});
    CHECK_EQ(nb_client_watch(&world.client, world.client_control_fd), -1);
    CHECK_EQ(nb_client_echo(&world.client, stop_fd, &counts), 0);
    expect_to_watch_as_before(&world);
    CHECK_EQ(nb_client_tap(&world.client, &tap, stop_fd), 0);
    expect_to_watch_as_before(&world);
    world.client.capture = calloc(1, sizeof(*world.client.capture));
    CHECK_EQ(nb_client_capture(&world.client, stop_fd, 1), 0);
    expect_to_watch_as_before(&world);
    free(world.client.capture);
    world.client.capture = NULL;
    close(tap.fd);
    close(stop_fd);
    world_close(&world);
}

TEST(what_cannot_be_watched_changes_nothing)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    CHECK_EQ(nb_client_watch(&world.client, world.client_control_fd), -1);
    CHECK_EQ(nb_client_watch(&world.client, 1000000), NB_WATCH_FAILED);
    CHECK_EQ(errno, EBADF);
    CHECK_EQ(eventfd_write(world.client_control_fd, 1), 0);
    CHECK_EQ(nb_client_wait(&world.client, NB_WAIT_CONTROL, 0), NB_WAIT_CONTROL);
    CHECK_EQ(nb_client_watch(&world.client, NB_WATCH_FAILED), world.client_control_fd);
    CHECK_EQ(nb_client_wait(&world.client, NB_WAIT_CONTROL, 0), NB_WAIT_CONTROL);
    world_close(&world);
}

/* Which says nothing against the driver. */
TEST(client_without_a_free_file_descriptor)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    struct nb_client client = world.client;
    struct rlimit limit, none = {0};
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
    none.rlim_max = limit.rlim_max;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
    CHECK_EQ(nb_client_init(&client), -2);
    CHECK_EQ(errno, EMFILE);
    CHECK_EQ(client.wait_fd, -1);
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
    world_close(&world);
}

/* A loop that cannot be told to end does not begin, and the driver is not blamed. */
TEST(a_loop_that_cannot_watch_says_so)
{
    struct world world;
    struct nb_echo_counts counts = {0};
    struct nb_capture capture = {0};
    world_open(&world, (struct world_config){0});
    world.client.capture = &capture;
    CHECK_EQ(nb_client_echo(&world.client, 1000000, &counts), -2);
    CHECK_EQ(errno, EBADF);
    CHECK_EQ(nb_client_capture(&world.client, 1000000, 1), -2);
    CHECK_EQ(errno, EBADF);
    world_close(&world);
}
