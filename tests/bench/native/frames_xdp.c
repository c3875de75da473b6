/* The kernel's driver with an AF_XDP socket: frames_xdp probe|receive|transmit|echo LENGTH TALLY INTERFACE
 *
 * Takes the best mode that the kernel grants: "zero-copy", where the device reads and writes our memory; "native, copied",
 * where the driver runs the XDP program and the kernel copies; "generic, copied", where the stack does both. probe: prints
 * that mode. The XDP program is libxdp's, which gives every frame to the socket; it is detached at the end, on SIGTERM.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/if_link.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <xdp/xsk.h>

#include "tally.h"

enum { BURST = 64, ROOM = 4096, FRAMES = 2048, MAC = 6, LOOK_MS = 500, BUSY_MS = 5000, BUSY_LOOK_MS = 10 };
enum work { RECEIVE, TRANSMIT, ECHO };

static const struct {
    const char *name;
    uint32_t xdp_flags;
    uint16_t bind_flags;
} MODES[] = {
    {"zero-copy", XDP_FLAGS_DRV_MODE, XDP_ZEROCOPY},
    {"native, copied", XDP_FLAGS_DRV_MODE, XDP_COPY},
    {"generic, copied", XDP_FLAGS_SKB_MODE, XDP_COPY},
};

struct port {
    uint8_t *frames; /* FRAMES of ROOM bytes, registered with the kernel */
    struct xsk_umem *umem;
    struct xsk_socket *socket;
    struct xsk_ring_prod fill, tx;
    struct xsk_ring_cons completed, rx;
};

static volatile sig_atomic_t stop;
static void on_signal(int number)
{
    (void)number;
    stop = 1;
}

/* In the first mode that is granted; its name, or NULL (errno) after telling why each was refused. EBUSY: none was. */
static const char *open_port(struct port *port, const char *interface)
{
    struct xsk_umem_config memory = {.fill_size = FRAMES, .comp_size = FRAMES, .frame_size = ROOM};
    setenv("LIBXDP_SKIP_DISPATCHER", "1", 1); /* which is for several programs on one interface, and costs a call each */
    for (size_t i = 0; i < sizeof(MODES) / sizeof(MODES[0]); i++) {
        struct xsk_socket_config config = {
            .rx_size = FRAMES,
            .tx_size = FRAMES,
            .xdp_flags = MODES[i].xdp_flags,
            .bind_flags = MODES[i].bind_flags | XDP_USE_NEED_WAKEUP,
        };
        int error = xsk_umem__create(&port->umem, port->frames, (uint64_t)FRAMES * ROOM, &port->fill, &port->completed, &memory);
        if (!error) {
            error = xsk_socket__create(&port->socket, interface, 0, port->umem, &port->rx, &port->tx, &config);
            if (!error)
                return MODES[i].name;
            xsk_umem__delete(port->umem);
        }
        errno = -error;
        if (errno == EBUSY)
            return NULL;
        fprintf(stderr, "frames_xdp: %s: %s\n", MODES[i].name, strerror(errno));
    }
    return NULL;
}

/* The kernel takes an earlier socket off the queue some time after its process ended, and nothing tells when. */
static const char *open_port_in_turn(struct port *port, const char *interface)
{
    const char *mode = open_port(port, interface);
    for (int waited = 0; !mode && errno == EBUSY && waited < BUSY_MS; waited += BUSY_LOOK_MS) {
        poll(NULL, 0, BUSY_LOOK_MS);
        mode = open_port(port, interface);
    }
    if (!mode && errno == EBUSY)
        fprintf(stderr, "frames_xdp: another socket has the queue, and kept it for %d ms\n", BUSY_MS);
    return mode;
}

/* To the receive queue, all of FRAMES at most: there is always room. */
static void post(struct port *port, const uint64_t *addresses, uint32_t count)
{
    uint32_t at;
    if (!count || xsk_ring_prod__reserve(&port->fill, count, &at) != count)
        return;
    for (uint32_t i = 0; i < count; i++)
        *xsk_ring_prod__fill_addr(&port->fill, at + i) = addresses[i];
    xsk_ring_prod__submit(&port->fill, count);
}

static void put(struct port *port, const struct xdp_desc *frames, uint32_t count)
{
    uint32_t at;
    if (!count || xsk_ring_prod__reserve(&port->tx, count, &at) != count)
        return;
    for (uint32_t i = 0; i < count; i++)
        *xsk_ring_prod__tx_desc(&port->tx, at + i) = frames[i];
    xsk_ring_prod__submit(&port->tx, count);
}

/* Takes up to a burst; echoes it, or gives it back at once. */
static uint32_t receive(struct port *port, bool echoes)
{
    uint64_t addresses[BURST];
    struct xdp_desc frames[BURST];
    uint32_t at, count = xsk_ring_cons__peek(&port->rx, BURST, &at);
    for (uint32_t i = 0; i < count; i++) {
        const struct xdp_desc *frame = xsk_ring_cons__rx_desc(&port->rx, at + i);
        uint8_t *data = xsk_umem__get_data(port->frames, frame->addr), mac[MAC];
        frames[i] = (struct xdp_desc){.addr = frame->addr, .len = frame->len};
        addresses[i] = frame->addr - frame->addr % ROOM;
        if (!echoes)
            continue;
        memcpy(mac, data, MAC);
        memcpy(data, data + MAC, MAC);
        memcpy(data + MAC, mac, MAC);
    }
    xsk_ring_cons__release(&port->rx, count);
    if (echoes)
        put(port, frames, count);
    else
        post(port, addresses, count);
    return count;
}

/* Frames that have been sent are posted for receiving, or sent again. */
static uint32_t complete(struct port *port, bool echoes, uint32_t length)
{
    uint64_t addresses[BURST];
    struct xdp_desc frames[BURST];
    uint32_t at, count = xsk_ring_cons__peek(&port->completed, BURST, &at);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t address = *xsk_ring_cons__comp_addr(&port->completed, at + i);
        addresses[i] = address - address % ROOM;
        frames[i] = (struct xdp_desc){.addr = address, .len = length};
    }
    xsk_ring_cons__release(&port->completed, count);
    if (echoes)
        post(port, addresses, count);
    else
        put(port, frames, count);
    return count;
}

static void work(struct port *port, enum work what, uint32_t length, volatile uint64_t *tally)
{
    struct pollfd look = {.fd = xsk_socket__fd(port->socket), .events = what == TRANSMIT ? POLLOUT : POLLIN};
    while (!stop) {
        uint32_t received = what == TRANSMIT ? 0 : receive(port, what == ECHO);
        uint32_t sent = what == RECEIVE ? 0 : complete(port, what == ECHO, length);
        *tally += what == TRANSMIT ? sent : received;
        if (what != RECEIVE && xsk_ring_prod__needs_wakeup(&port->tx) &&
            sendto(look.fd, NULL, 0, MSG_DONTWAIT, NULL, 0) < 0 && errno != EAGAIN && errno != EBUSY && errno != ENOBUFS) {
            perror("frames_xdp: sendto");
            return;
        }
        if (!received && !sent)
            poll(&look, 1, LOOK_MS);
    }
}

int main(int argc, char **argv)
{
    static const char *const WORDS[] = {"receive", "transmit", "echo"};
    static struct port port;
    int what = 0;
    if (argc != 5)
        return 2;
    while (what <= ECHO && strcmp(argv[1], WORDS[what]))
        what++;
    uint32_t length = (uint32_t)strtoul(argv[2], NULL, 10);
    if (length < ETH_HLEN || length > ROOM || (what > ECHO && strcmp(argv[1], "probe")))
        return 2;
    volatile uint64_t *tally = tally_open(argv[3]);
    signal(SIGTERM, on_signal);
    port.frames = mmap(NULL, (size_t)FRAMES * ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    const char *mode = port.frames == MAP_FAILED ? NULL : open_port_in_turn(&port, argv[4]);
    if (!mode)
        return 1;
    if (what > ECHO) {
        puts(mode);
    } else {
        fprintf(stderr, "frames_xdp: serving frames, %s\n", mode);
        for (uint32_t i = 0; i < FRAMES; i++) {
            uint64_t address = (uint64_t)i * ROOM;
            struct xdp_desc frame = {.addr = address, .len = length};
            memcpy(port.frames + address, "\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\2\x88\xb5", ETH_HLEN);
            if (what == TRANSMIT)
                put(&port, &frame, 1);
            else
                post(&port, &address, 1);
        }
        work(&port, (enum work)what, length, tally);
    }
    xsk_socket__delete(port.socket);
    xsk_umem__delete(port.umem);
    return what > ECHO || stop ? 0 : 1;
}
