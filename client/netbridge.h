/* netbridge.h: the client's end of Net-Bridge's port, for network stacks in C. Link with libnetbridge-client.
 *
 *     struct netbridge_failure failure;
 *     struct netbridge *port = netbridge_connect(NETBRIDGE_SOCKET, "my-stack", 5000, &failure);
 *
 * A received piece is this process's until it is released, a buffer to send until it is sent; `data` points straight
 * into DMA memory. There are few of them, so give frames back soon: the driver drops what comes while a client holds
 * its limit. Nothing that the driver says or writes is believed before it was checked; what breaks the protocol ends the
 * session with an error, and so does the driver's leaving. Close then, and connect again if `failure.may_pass`.
 *
 * One thread at a time may use a session. No function but netbridge_connect and netbridge_wait waits. The port itself is
 * described in docs/port.md, this library in docs/client-c.md.
 */
#ifndef NETBRIDGE_H
#define NETBRIDGE_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NETBRIDGE_SOCKET "/run/netbridge/aethernet.sock"

/* One session with the driver. */
struct netbridge;

/* Errors, returned as they stand. All but NETBRIDGE_MISUSE end the session: every later call returns the same. */
enum netbridge_error {
    NETBRIDGE_UNAVAILABLE = -1, /* no driver listens there, or it does not answer in time */
    NETBRIDGE_CLOSED = -2,      /* the driver said BYE, with `reason`, or hung up */
    NETBRIDGE_BROKEN = -3,      /* it broke the protocol: an entry, a count or a message that may not be */
    NETBRIDGE_GEOMETRY = -4,    /* what it offered does not hold together */
    NETBRIDGE_SYSTEM = -5,      /* a system call failed: `reason` is its errno */
    NETBRIDGE_MISUSE = -6       /* this call may not be made so; nothing was done */
};

/* Why the driver said BYE (docs/port.md). */
enum netbridge_reason {
    NETBRIDGE_REASON_UNSPECIFIED,
    NETBRIDGE_REASON_SHUTDOWN,
    NETBRIDGE_REASON_BUSY,
    NETBRIDGE_REASON_NOT_PERMITTED,
    NETBRIDGE_REASON_VERSION,
    NETBRIDGE_REASON_MALFORMED,
    NETBRIDGE_REASON_UNEXPECTED,
    NETBRIDGE_REASON_TIMEOUT,
    NETBRIDGE_REASON_GEOMETRY,
    NETBRIDGE_REASON_RING_FAULT,
    NETBRIDGE_REASON_DEVICE_RESET,
    NETBRIDGE_REASON_NOT_SHARED,
    NETBRIDGE_REASON_FAILED
};

struct netbridge_failure {
    int error;      /* enum netbridge_error; 0: none */
    int reason;     /* enum netbridge_reason (CLOSED), errno (SYSTEM), else 0 */
    bool may_pass;  /* connecting again later may work out without anybody changing anything */
    char text[192]; /* for a person; printable ASCII */
};

/* What may change while a session lasts. `speed_mbps`: 0 when it is not known. */
struct netbridge_facts {
    uint8_t mac[6];
    bool link_up;
    uint32_t mtu; /* payload after the Ethernet header */
    uint32_t speed_mbps;
    uint32_t announcements; /* how often the network was to hear of this station, by a gratuitous ARP, say */
};

/* A frame or a part of one, or a buffer to write a frame into. */
struct netbridge_piece {
    uint64_t dma_handle; /* leave it as it is */
    uint8_t *data;
    uint32_t len;   /* received: bytes here. Allocated: room; set it to the frame's bytes before sending */
    uint8_t flags;  /* received: enum netbridge_flags. To send: 0 */
    uint8_t queue;  /* the queue pair that a frame came from, or is to be sent on, below netbridge_queue_pairs */
    uint16_t reserved;
};
enum netbridge_flags { NETBRIDGE_MORE = 1, NETBRIDGE_CONTINUATION = 2 };

/* Connects to the driver that listens at `path` and takes the port over; `timeout_ms` bounds the handshake. `name`: what
 * the driver's log and counters call this client; 1 to 32 letters, digits, '.', '_' or '-'. NULL: see `failure`, which
 * may be NULL too. */
struct netbridge *netbridge_connect(const char *path, const char *name, int timeout_ms,
                                    struct netbridge_failure *failure);
/* Says BYE, if nobody has, and unmaps everything: no piece is good any more. NULL does no harm. */
void netbridge_close(struct netbridge *port);
/* Why the session has ended, or what the last misuse was; `error` 0 while there was neither. */
const struct netbridge_failure *netbridge_last_failure(const struct netbridge *port);

/* Kept up to date by netbridge_check. */
const struct netbridge_facts *netbridge_facts(const struct netbridge *port);
/* The session's number. */
uint16_t netbridge_session(const struct netbridge *port);
/* The longest frame that can be sent, bytes. */
uint32_t netbridge_room(const struct netbridge *port);
/* How many RX buffers this client may hold before frames are dropped. */
uint32_t netbridge_rx_limit(const struct netbridge *port);
/* How many queue pairs the device has. */
uint32_t netbridge_queue_pairs(const struct netbridge *port);

/* Reads what the driver has said: 0, or an error. Call it when netbridge_wait found NETBRIDGE_WAIT_CONTROL. */
int netbridge_check(struct netbridge *port);

/* Up to `most` received pieces, in order: how many, or an error. A frame of several is pieces in a row, all but the last
 * with NETBRIDGE_MORE, all but the first with NETBRIDGE_CONTINUATION; its end may come with a later call. */
int netbridge_receive(struct netbridge *port, struct netbridge_piece *pieces, uint32_t most);
/* Gives received pieces back, in any order: 0, or an error. */
int netbridge_release(struct netbridge *port, const struct netbridge_piece *pieces, uint32_t count);
/* Up to `most` buffers to write frames into: how many, or an error. */
int netbridge_allocate(struct netbridge *port, struct netbridge_piece *pieces, uint32_t most);
/* Sends allocated buffers, a frame in each, `len` bytes of it, 14 to netbridge_room: 0, or an error. */
int netbridge_send(struct netbridge *port, const struct netbridge_piece *pieces, uint32_t count);
/* Wakes the driver if it sleeps. Call it once after a burst of release and send. */
void netbridge_flush(struct netbridge *port);

enum netbridge_wait { NETBRIDGE_WAIT_RECEIVE = 1, NETBRIDGE_WAIT_ALLOCATE = 2, NETBRIDGE_WAIT_CONTROL = 4 };
/* Waits until there is something to receive or to allocate, as `wanted` says, or the driver has said something, at most
 * `timeout_ms` (-1: as long as it takes): what was found, 0 for nothing (also when a signal came), or an error. */
int netbridge_wait(struct netbridge *port, int wanted, int timeout_ms);

/* For event loops: readable after netbridge_arm when what was wanted has come, or the driver has said something. */
int netbridge_fd(const struct netbridge *port);
/* Asks the driver to ring for what is `wanted`: what is there already (look at that first, no bell will ring for it), 0
 * when nothing is, or an error. */
int netbridge_arm(struct netbridge *port, int wanted);

#ifdef __cplusplus
}
#endif
#endif
