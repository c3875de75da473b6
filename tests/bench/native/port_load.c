/* Frames between two processes, one processor each: over the port, and as one message each over what the kernel has.
 *
 *     port_load WHAT KIND LENGTH MILLISECONDS CPU_A CPU_B
 *
 * WHAT is port, seqpacket, pipe or, for wake, eventfd. KIND is one of
 *
 *     oneway    from A, the driver, to B, the service
 *     forward   there and back as it is
 *     echo      there and back; on the port with the MAC addresses exchanged in the buffer that the frame came in
 *     copy      the same into a buffer of the service's own, as one must do that may only read what is received; port only
 *     wake      A wakes a sleeping B, each time once it has gone to sleep again
 *
 * Messages are copied by the kernel, and never looked at. Prints million frames a second; for wake, nanoseconds from before
 * the waking to B awake: p50 and p99.
 *
 * On the port, A does what the pump does: leases from the ledger, checks of what comes back, the same burst. The service is
 * the client library. Both poll, as DPDK does. A sent frame's first 42 bytes are written each time.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ledger.h"
#include "port_ring.h"

enum { BUFFERS = 1024, MAC_BYTES = 6, STRIDE = 2048, HEADROOM = 64, BURST = 64, SHORTEST = 60, TEMPLATE_BYTES = 42, LONGEST = 1984, WAKES = 2000, IN_FLIGHT = 32 };

/* tx_active, the third, may have all buffers of both regions in it. */
enum { RINGS = 4, TX_ACTIVE = 2 };
#define RING_BYTES(slots) (sizeof(struct nb_ring_header) + (slots) * sizeof(struct nb_entry))

enum kind { ONEWAY, FORWARD, ECHO, COPY, WAKE };
static const char *const KINDS[] = {"oneway", "forward", "echo", "copy", "wake"};

/* What both processes see. */
struct shared {
    uint64_t waker_ns;  /* when A began to wake B */
    uint64_t woken[WAKES];
    uint32_t woken_count;
    uint32_t sleeping; /* how often B was about to sleep */
};

static struct shared *shared;
static uint8_t *rx_base, *tx_base, *rings;
static int to_b[2], to_a[2]; /* eventfds, or the two ends of sockets or pipes */
static uint32_t length;
static uint64_t duration_ns;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void *map_shared(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    return memory;
}

static void pin(const char *cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(atoi(cpu), &set);
    if (sched_setaffinity(0, sizeof(set), &set))
        die("sched_setaffinity");
    if (geteuid() == 0)
        setpriority(PRIO_PROCESS, 0, -20);
}

static uint64_t deadline(void) { return now_ns() + duration_ns; }

static int by_value(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return left < right ? -1 : left > right;
}

static void report_wakes(void)
{
    qsort(shared->woken, WAKES, sizeof(shared->woken[0]), by_value);
    printf("%llu %llu\n", (unsigned long long)shared->woken[WAKES / 2], (unsigned long long)shared->woken[WAKES * 99 / 100]);
}

/* That it is about to sleep can be seen; that it does cannot. */
static void let_it_sleep(void)
{
    for (uint64_t until = now_ns() + 20000; now_ns() < until;)
        cpu_relax();
}

/* ---- The port ------------------------------------------------------------------------------------------------- */

static struct nb_ring_place ring_at(int which)
{
    size_t before = (size_t)which * RING_BYTES(BUFFERS) + (which > TX_ACTIVE ? BUFFERS * sizeof(struct nb_entry) : 0);
    return (struct nb_ring_place){(struct nb_ring_header *)(rings + before), which == TX_ACTIVE ? 2 * BUFFERS : BUFFERS};
}

static const uint8_t template[TEMPLATE_BYTES] = {0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x88, 0xb5};

static uint32_t check_sent(const struct nb_ledger *ledger, const struct nb_entry *entry)
{
    int64_t buffer = ledger_check(ledger, entry->dma_handle);
    if (buffer < 0 || entry->kind != NB_TX_PACKET || entry->flags || entry->len < 14 || entry->len > ledger_room(ledger))
        exit(1);
    return (uint32_t)buffer;
}

static void port_driver(enum kind kind)
{
    struct nb_region regions[] = {
        {.base = rx_base, .count = BUFFERS, .stride = STRIDE, .headroom = HEADROOM, .session = 1, .id = NB_REGION_RX},
        {.base = tx_base, .count = BUFFERS, .stride = STRIDE, .headroom = HEADROOM, .session = 1, .id = NB_REGION_TX},
    };
    struct nb_ledger *rx = nb_ledger_new(&regions[0]), *tx = nb_ledger_new(&regions[1]);
    struct nb_ring_place rx_active = ring_at(0), rx_free = ring_at(1), tx_active = ring_at(2), tx_done = ring_at(3);
    uint32_t rx_put = 0, rx_taken = 0, tx_taken = 0, tx_put = 0, wakes = 0;
    uint64_t frames = 0, begin = now_ns(), end = deadline();
    while (ledger_free_count(tx))
        ring_put(&tx_done, &tx_put, (struct nb_entry){.dma_handle = ledger_lend(tx, ledger_take_for_device(tx)), .len = ledger_room(tx), .kind = NB_TX_PACKET_ACK});
    ring_publish(&tx_done, tx_put);
    for (uint32_t rounds = 0; kind == WAKE ? wakes < WAKES : rounds % 64 || now_ns() < end; rounds++) {
        int64_t back = ring_waiting(&rx_free, rx_taken);
        for (int64_t i = 0; i < back; i++) {
            struct nb_entry entry = ring_take(&rx_free, &rx_taken);
            int64_t buffer = ledger_check(rx, entry.dma_handle);
            if (buffer < 0 || entry.kind != NB_RX_PACKET)
                exit(1);
            ledger_put_free(rx, (uint32_t)buffer);
            frames += kind == ONEWAY;
        }
        if (back > 0)
            ring_consumed(&rx_free, rx_taken);
        int64_t sent = ring_waiting(&tx_active, tx_taken);
        for (int64_t i = 0; i < sent; i++) {
            struct nb_entry entry = ring_take(&tx_active, &tx_taken);
            if (kind == COPY)
                ring_put(&tx_done, &tx_put, (struct nb_entry){.dma_handle = ledger_lend(tx, check_sent(tx, &entry)), .len = ledger_room(tx), .kind = NB_TX_PACKET_ACK});
            else
                ledger_put_free(rx, check_sent(rx, &entry)); /* forwarded */
            frames++;
        }
        if (sent > 0) {
            ring_consumed(&tx_active, tx_taken);
            ring_publish(&tx_done, tx_put);
        }
        if (kind == WAKE && !load_once_32(&rx_active.header->wake)) {
            cpu_relax();
            continue;
        }
        uint32_t put = rx_put;
        for (uint32_t i = 0; i < (kind == WAKE ? 1 : BURST) && ledger_free_count(rx); i++) {
            uint32_t buffer = ledger_take_for_device(rx);
            memcpy(ledger_address(rx, buffer) + HEADROOM, template, TEMPLATE_BYTES);
            ring_put(&rx_active, &rx_put, (struct nb_entry){.dma_handle = ledger_lend(rx, buffer), .len = length, .kind = NB_RX_PACKET});
        }
        if (put == rx_put)
            continue;
        if (kind == WAKE) {
            let_it_sleep();
            store_once_64(&shared->waker_ns, now_ns());
        }
        ring_publish(&rx_active, rx_put);
        if (ring_must_wake(&rx_active)) {
            doorbell_ring(to_b[0]);
            wakes++;
        }
    }
    if (kind == WAKE) {
        while (load_acquire_32(&shared->woken_count) < WAKES)
            cpu_relax();
        report_wakes();
    } else {
        printf("%.4f\n", (double)frames * 1e3 / (double)(now_ns() - begin));
    }
}

static void exchange_addresses(uint8_t *to, const uint8_t *from)
{
    uint8_t addresses[2 * MAC_BYTES];
    memcpy(addresses, from, sizeof(addresses));
    memcpy(to, addresses + MAC_BYTES, MAC_BYTES);
    memcpy(to + MAC_BYTES, addresses, MAC_BYTES);
}

/* Into buffers of its own, and the received ones back. */
static void send_copies(struct nb_client *client, const struct nb_piece *in, uint32_t got)
{
    struct nb_piece out[BURST];
    int room = nb_client_allocate(client, out, got);
    if (room < 0)
        exit(1);
    for (int i = 0; i < room; i++) {
        exchange_addresses(out[i].data, in[i].data);
        memcpy(out[i].data + 2 * MAC_BYTES, in[i].data + 2 * MAC_BYTES, in[i].len - 2 * MAC_BYTES);
        out[i].len = in[i].len;
        out[i].flags = 0;
    }
    nb_client_send(client, out, (uint32_t)room);
    nb_client_release(client, in, got);
}

static void port_service(enum kind kind)
{
    int epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, to_b[0], &event))
        die("epoll");
    struct nb_client client = {
        .rx_active = ring_at(0), .rx_free = ring_at(1), .tx_active = ring_at(2), .tx_done = ring_at(3),
        .rx_base = rx_base, .tx_base = tx_base, .rx_count = BUFFERS, .tx_count = BUFFERS,
        .rx_stride = STRIDE, .tx_stride = STRIDE, .headroom = HEADROOM, .continuation_offset = HEADROOM - 12,
        .tx_largest_frame = LONGEST, .tx_max_pieces = 1, .queue_pairs = 1,
        .client_doorbell_fd = to_a[0], .driver_doorbell_fd = epoll,
    };
    if (nb_client_init(&client))
        exit(1);
    struct nb_piece in[BURST];
    for (;;) {
        if (kind == WAKE) {
            int ready = nb_client_wait(&client, NB_WAIT_RECEIVE, -1);
            uint64_t now = now_ns();
            if (ready <= 0)
                exit(1);
            uint32_t count = shared->woken_count;
            if (count == WAKES)
                continue;
            shared->woken[count] = now - load_once_64(&shared->waker_ns);
            store_release_32(&shared->woken_count, count + 1);
        }
        int got = nb_client_receive(&client, in, BURST);
        if (got < 0)
            exit(1);
        if (got == 0)
            continue;
        for (int i = 0; kind == ECHO && i < got; i++)
            exchange_addresses(in[i].data, in[i].data);
        if (kind == COPY)
            send_copies(&client, in, (uint32_t)got);
        else if (kind == FORWARD || kind == ECHO)
            nb_client_forward(&client, in, (uint32_t)got);
        else
            nb_client_release(&client, in, (uint32_t)got);
        nb_client_flush(&client);
    }
}

/* ---- A message for each frame --------------------------------------------------------------------------------- */

static void message_a(enum kind kind, uint32_t bytes)
{
    uint8_t frame[LONGEST] = {1}, back[LONGEST];
    uint64_t frames = 0, begin = now_ns(), end = deadline();
    if (kind == WAKE) {
        for (int i = 0; i < WAKES; i++) {
            while (load_acquire_32(&shared->sleeping) <= (uint32_t)i)
                cpu_relax();
            let_it_sleep();
            store_once_64(&shared->waker_ns, now_ns());
            if (write(to_b[1], frame, bytes) != (ssize_t)bytes)
                die("write");
        }
        while (load_acquire_32(&shared->woken_count) < WAKES)
            cpu_relax();
        report_wakes();
        return;
    }
    while (now_ns() < end) {
        /* As many under way as fit a pipe when they are long. */
        for (int i = 0; i < IN_FLIGHT; i++, frames++) {
            memcpy(frame, template, TEMPLATE_BYTES);
            if (write(to_b[1], frame, bytes) != (ssize_t)bytes)
                die("write");
        }
        for (int i = 0; kind != ONEWAY && i < IN_FLIGHT; i++)
            if (read(to_a[0], back, bytes) != (ssize_t)bytes)
                die("read");
    }
    printf("%.4f\n", (double)frames * 1e3 / (double)(now_ns() - begin));
}

static void message_b(enum kind kind, uint32_t bytes)
{
    uint8_t frame[LONGEST];
    for (;;) {
        if (kind == WAKE)
            store_release_32(&shared->sleeping, shared->sleeping + 1);
        if (read(to_b[0], frame, bytes) != (ssize_t)bytes)
            exit(0);
        if (kind == WAKE && shared->woken_count < WAKES) {
            shared->woken[shared->woken_count] = now_ns() - load_once_64(&shared->waker_ns);
            store_release_32(&shared->woken_count, shared->woken_count + 1);
        } else if (kind != WAKE && kind != ONEWAY && write(to_a[1], frame, bytes) != (ssize_t)bytes) {
            die("write");
        }
    }
}

static enum kind kind_named(const char *name)
{
    unsigned kind = 0;
    while (strcmp(KINDS[kind], name) != 0)
        if (++kind == sizeof(KINDS) / sizeof(KINDS[0])) {
            fprintf(stderr, "port_load: %s: no such KIND; see port_load.c\n", name);
            exit(2);
        }
    return (enum kind)kind;
}

int main(int argc, char **argv)
{
    if (argc != 7 || (length = (uint32_t)atoi(argv[3])) < SHORTEST || length > LONGEST) {
        fprintf(stderr, "usage: port_load port|seqpacket|pipe|eventfd oneway|forward|echo|copy|wake LENGTH MILLISECONDS "
                        "CPU_A CPU_B\n");
        return 2;
    }
    const char *what = argv[1];
    enum kind kind = kind_named(argv[2]);
    duration_ns = (uint64_t)atoi(argv[4]) * 1000000;
    shared = map_shared(sizeof(*shared));
    rings = map_shared(RINGS * RING_BYTES(2 * BUFFERS));
    rx_base = map_shared((size_t)BUFFERS * STRIDE);
    tx_base = map_shared((size_t)BUFFERS * STRIDE);
    bool is_port = !strcmp(what, "port");
    if (is_port || !strcmp(what, "eventfd")) {
        int flags = is_port ? EFD_NONBLOCK : 0;
        to_b[0] = to_b[1] = eventfd(0, flags);
        to_a[0] = to_a[1] = eventfd(0, flags);
        if (!is_port)
            length = sizeof(uint64_t);
    } else if (!strcmp(what, "pipe")) {
        if (pipe(to_b) || pipe(to_a))
            die("pipe");
    } else if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, to_b) || socketpair(AF_UNIX, SOCK_SEQPACKET, 0, to_a)) {
        die("socketpair");
    }
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(argv[6]);
        is_port ? port_service(kind) : message_b(kind, length);
        return 0;
    }
    pin(argv[5]);
    is_port ? port_driver(kind) : message_a(kind, length);
    fflush(stdout);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    return 0;
}
