/* Pauses, late stores, and the system calls that the linker routes through here (--wrap): see jitter.h. */
#include "jitter.h"

#include <sched.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

uint32_t jitter_every;
bool stores_are_late;
int (*instead_of_poll)(struct pollfd *fds, nfds_t count, int timeout);
int (*instead_of_epoll_wait)(int timeout);
void (*before_epoll_wait)(void);

static uint32_t draw(void)
{
    static _Thread_local uint32_t state;
    if (!state)
        state = (uint32_t)(uintptr_t)&state | 1;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

void jitter(void)
{
    if (!jitter_every || draw() % jitter_every != 0)
        return;
    uint32_t turns = draw() % 2000;
    if (turns < 100)
        sched_yield();
    for (volatile uint32_t i = 0; i < turns; i++)
        ;
}

/* ---- Late stores ---------------------------------------------------------------------------------------------- */

enum { MOST_LATE = 8 };

static _Thread_local struct {
    void *word;
    uint32_t value;
    unsigned bytes;
} late[MOST_LATE];
static _Thread_local unsigned late_count;

static void drain_oldest(void)
{
    if (late[0].bytes == 2)
        __atomic_store_n((uint16_t *)late[0].word, (uint16_t)late[0].value, __ATOMIC_RELEASE);
    else
        __atomic_store_n((uint32_t *)late[0].word, late[0].value, __ATOMIC_RELEASE);
    memmove(&late[0], &late[1], --late_count * sizeof(late[0]));
}

void drain_stores(void)
{
    while (late_count)
        drain_oldest();
}

void store_late(void *word, uint32_t value, unsigned bytes)
{
    if (late_count == MOST_LATE)
        drain_oldest();
    late[late_count].word = word;
    late[late_count].value = value;
    late[late_count++].bytes = bytes;
}

bool stored_late(const void *word, uint32_t *value)
{
    for (unsigned i = late_count; i > 0; i--) {
        if (late[i - 1].word == word) {
            *value = late[i - 1].value;
            return true;
        }
    }
    return false;
}

/* ---- System calls --------------------------------------------------------------------------------------------- */

int __real_epoll_wait(int fd, struct epoll_event *events, int most, int timeout);
int __wrap_epoll_wait(int fd, struct epoll_event *events, int most, int timeout);
int __wrap_epoll_wait(int fd, struct epoll_event *events, int most, int timeout)
{
    if (instead_of_epoll_wait)
        return instead_of_epoll_wait(timeout);
    drain_stores();
    jitter();
    if (before_epoll_wait)
        before_epoll_wait();
    int ready = __real_epoll_wait(fd, events, most, timeout);
    jitter();
    return ready;
}

int __real_poll(struct pollfd *fds, nfds_t count, int timeout);

int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout)
{
    if (instead_of_poll)
        return instead_of_poll(fds, count, timeout);
    drain_stores();
    jitter();
    int ready = __real_poll(fds, count, timeout);
    jitter();
    return ready;
}

int __real_eventfd_write(int fd, eventfd_t value);
int __wrap_eventfd_write(int fd, eventfd_t value);
int __wrap_eventfd_write(int fd, eventfd_t value)
{
    drain_stores();
    jitter();
    return __real_eventfd_write(fd, value);
}
