/* Random delays, and the system calls that the linker routes through here (--wrap). */
#include "jitter.h"

#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

uint32_t jitter_every;
int (*instead_of_poll)(struct pollfd *fds, nfds_t count, int timeout);

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

int __real_epoll_wait(int fd, struct epoll_event *events, int most, int timeout);
int __wrap_epoll_wait(int fd, struct epoll_event *events, int most, int timeout);
int __wrap_epoll_wait(int fd, struct epoll_event *events, int most, int timeout)
{
    jitter();
    int ready = __real_epoll_wait(fd, events, most, timeout);
    jitter();
    return ready;
}

int __real_poll(struct pollfd *fds, nfds_t count, int timeout);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout);
int real_poll(struct pollfd *fds, nfds_t count, int timeout) { return __real_poll(fds, count, timeout); }

int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout)
{
    if (instead_of_poll)
        return instead_of_poll(fds, count, timeout);
    jitter();
    int ready = __real_poll(fds, count, timeout);
    jitter();
    return ready;
}

int __real_eventfd_write(int fd, eventfd_t value);
int __wrap_eventfd_write(int fd, eventfd_t value);
int __wrap_eventfd_write(int fd, eventfd_t value)
{
    jitter();
    return __real_eventfd_write(fd, value);
}
