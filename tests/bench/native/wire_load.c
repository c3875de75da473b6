/* The host's end of a guest's wire, one datagram a frame, as a load:
 *
 *     wire_load FD flood LENGTH MAC                      until it is killed
 *     wire_load FD sink MS                               frames/s that come, within a window of so many milliseconds
 *     wire_load FD window LENGTH MAC MS                  frames/s that come back, WINDOW of them under way
 *     wire_load FD paced LENGTH MAC MS RATE              frames/s that come back, RATE a second sent
 *     wire_load FD first LENGTH MAC MS                   a frame every few ms until one comes back: when, CLOCK_MONOTONIC in ns
 *     wire_load FD roundtrip LENGTH MAC MS               p50 and p99 of one frame at a time there and back, ns
 *
 * Every frame but the flood's bears a number that no earlier run has given out, so that what an earlier driver has left
 * on the wire is not taken for an answer. Sleeps while there is nothing to do: processors are few. Never sends an empty
 * datagram, which would end the wire for QEMU.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>

enum { LONGEST = 65536, WINDOW = 64, MOST = 1 << 20, SETTLE_MS = 300, GIVE_UP_MS = 200, KNOCK_MS = 5, NUMBER_AT = 14 };

static int fd;
static uint8_t frame[LONGEST], came[LONGEST];

static int64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static _Noreturn void fail(const char *what)
{
    perror(what);
    exit(1);
}

/* Whether there is something to read, or if `events` says so, room to write. */
static short await(short events, int ms)
{
    struct pollfd one = {.fd = fd, .events = events};
    if (poll(&one, 1, ms) < 0 && errno != EINTR)
        fail("poll");
    return one.revents & events;
}

/* Bytes of the next frame, or 0 when there is none. */
static ssize_t take(void)
{
    ssize_t length = recv(fd, came, sizeof(came), MSG_DONTWAIT);
    if (length < 0 && errno != EAGAIN)
        fail("recv");
    return length > 0 ? length : 0;
}

static int put(size_t length, uint64_t number)
{
    memcpy(frame + NUMBER_AT, &number, sizeof(number));
    if (send(fd, frame, length, MSG_DONTWAIT) >= 0)
        return 1;
    if (errno != EAGAIN)
        fail("send");
    return 0;
}

static void flood(size_t length)
{
    for (;;)
        if (send(fd, frame, length, 0) < 0)
            fail("send");
}

static void sink(int64_t ms)
{
    int64_t begin = now_ns() + SETTLE_MS * 1000000LL, now = 0;
    uint64_t count = 0;
    while ((now = now_ns()) < begin + ms * 1000000) {
        await(POLLIN, 10);
        for (int i = 0; i < 64 && take(); i++)
            count += now >= begin;
    }
    printf("%.1f\n", (double)count * 1e9 / (double)(now - begin));
}

static void echo_window(size_t length, int64_t ms, uint64_t first)
{
    int64_t begin = now_ns() + SETTLE_MS * 1000000LL, now = 0, heard = now_ns();
    uint64_t next = first, count = 0, lost = 0;
    int under_way = 0;
    while ((now = now_ns()) < begin + ms * 1000000) {
        while (under_way < WINDOW && put(length, next)) {
            next++;
            under_way++;
        }
        await(under_way < WINDOW ? POLLIN | POLLOUT : POLLIN, 10);
        while (take()) {
            uint64_t number;
            memcpy(&number, came + NUMBER_AT, sizeof(number));
            if (number - first >= next - first)
                continue;
            under_way -= under_way > 0;
            count += now >= begin;
            heard = now;
        }
        if (now - heard > GIVE_UP_MS * 1000000LL) {
            lost += (uint64_t)under_way;
            under_way = 0;
            heard = now;
        }
    }
    printf("%.1f %llu\n", (double)count * 1e9 / (double)(now - begin), (unsigned long long)lost);
}

/* Frames that have come, which this run has sent: of those from `first` up to `next`. */
static uint64_t take_ours(uint64_t first, uint64_t next)
{
    uint64_t number, count = 0;
    while (take()) {
        memcpy(&number, came + NUMBER_AT, sizeof(number));
        count += number - first < next - first;
    }
    return count;
}

static void paced(size_t length, int64_t ms, uint64_t rate, uint64_t first)
{
    int64_t start = now_ns(), now = start;
    uint64_t next = first, count = 0;
    for (; now < start + ms * 1000000; now = now_ns()) {
        uint64_t due = first + (uint64_t)((double)(now - start) * (double)rate / 1e9);
        while (next < due && put(length, next))
            next++;
        await(POLLIN, 1);
        count += take_ours(first, next);
    }
    printf("%.1f\n", (double)count * 1e9 / (double)(now - start));
}

static void first_answer(size_t length, int64_t ms, uint64_t first)
{
    int64_t end = now_ns() + ms * 1000000, knocked = 0, now = 0;
    uint64_t next = first;
    while ((now = now_ns()) < end) {
        if (now - knocked >= KNOCK_MS * 1000000LL && put(length, next)) {
            next++;
            knocked = now;
        }
        if (await(POLLIN, KNOCK_MS) && take_ours(first, next)) {
            printf("%lld\n", (long long)now_ns());
            return;
        }
    }
    fputs("no frame came back\n", stderr);
    exit(1);
}

static int ascending(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

static void roundtrip(size_t length, int64_t ms, uint64_t first)
{
    static uint64_t times[MOST];
    size_t count = 0;
    int64_t begin = now_ns() + SETTLE_MS * 1000000LL, end = begin + ms * 1000000;
    for (uint64_t number = first; now_ns() < end && count < MOST; number++) {
        int64_t sent = now_ns(), answered = 0;
        while (!put(length, number))
            await(POLLOUT, GIVE_UP_MS);
        while (!answered && now_ns() - sent < GIVE_UP_MS * 1000000LL) {
            await(POLLIN, GIVE_UP_MS);
            while (!answered && take())
                if (!memcmp(came + NUMBER_AT, &number, sizeof(number)))
                    answered = now_ns();
        }
        if (answered && sent >= begin)
            times[count++] = (uint64_t)(answered - sent);
    }
    if (!count) {
        fputs("no frame came back\n", stderr);
        exit(1);
    }
    qsort(times, count, sizeof(times[0]), ascending);
    printf("%llu %llu\n", (unsigned long long)times[count / 2], (unsigned long long)times[count * 99 / 100]);
}

/* A load that is woken for each frame, and takes QEMU's processor each time, halves what goes through, or does not, from one
 * run to the next. SCHED_BATCH: nobody loses the processor to it. */
static void keep_in_the_background(void)
{
    if (sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){0}))
        fail("sched_setscheduler");
}

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[2] : "";
    if (strcmp(what, "roundtrip") && strcmp(what, "first"))
        keep_in_the_background();
    fd = argc > 1 ? atoi(argv[1]) : -1;
    if (!strcmp(what, "sink") && argc == 4) {
        sink(atoll(argv[3]));
        return 0;
    }
    size_t length = argc > 3 ? strtoul(argv[3], NULL, 10) : 0;
    uint8_t *mac = frame;
    if (argc < 5 || length < 60 || length > LONGEST ||
        sscanf(argv[4], "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5) != 6) {
        fputs("usage: wire_load FD flood|sink|window|roundtrip ...: see wire_load.c\n", stderr);
        return 2;
    }
    memcpy(frame + 6, "\x02\0\0\0\0\1\x88\xb5", 8);
    uint64_t first;
    if (getrandom(&first, sizeof(first), 0) != sizeof(first))
        fail("getrandom");
    while (take())
        ;
    if (!strcmp(what, "flood"))
        flood(length);
    else if (!strcmp(what, "window") && argc == 6)
        echo_window(length, atoll(argv[5]), first);
    else if (!strcmp(what, "roundtrip") && argc == 6)
        roundtrip(length, atoll(argv[5]), first);
    else if (!strcmp(what, "paced") && argc == 7)
        paced(length, atoll(argv[5]), strtoull(argv[6], NULL, 10), first);
    else if (!strcmp(what, "first") && argc == 6)
        first_answer(length, atoll(argv[5]), first);
    else
        return 2;
    return 0;
}
