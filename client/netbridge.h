/* netbridge.h: the client's end of Net-Bridge's port, for network stacks in C. Link with libnetbridge-client.
 *
 *     struct netbridge_failure failure;
 *     struct netbridge *port = netbridge_connect(NETBRIDGE_SOCKET, "my-stack", 0, 5000, &failure);
 *
 * A received piece is this process's until it is released or forwarded, a buffer to send until it is sent; `data`
 * points straight into DMA memory. There are few of them, so give frames back soon: the driver drops what comes while a
 * client holds its limit. Nothing that the driver says or writes is believed before it was checked; what breaks the
 * protocol ends the session with an error, and so does the driver's leaving. Close then, and connect again if
 * `failure.may_pass`.
 *
 * One thread at a time may use a session. No function waits but netbridge_wait and those that are given a timeout. The port
 * itself is described in docs/port.md, this library in docs/client-c.md.
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

/* Errors, returned as they stand. All but the last three end the session: every later call returns the same. */
enum netbridge_error {
    NETBRIDGE_UNAVAILABLE = -1, /* no driver listens there, or it does not answer in time */
    NETBRIDGE_CLOSED = -2,      /* the driver said BYE, with `reason`, or hung up */
    NETBRIDGE_BROKEN = -3,      /* it broke the protocol: an entry, a count or a message that may not be */
    NETBRIDGE_GEOMETRY = -4,    /* what it offered does not hold together */
    NETBRIDGE_SYSTEM = -5,      /* a system call failed: `reason` is its errno */
    NETBRIDGE_MISUSE = -6,      /* this call may not be made so; nothing was done */
    NETBRIDGE_REFUSED = -7,     /* the driver does not do what was asked for: `reason` is its verdict */
    NETBRIDGE_TIMEOUT = -8      /* it did not answer what was asked for in time; it may do it yet */
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
    int reason;     /* enum netbridge_reason (CLOSED), enum netbridge_verdict (REFUSED), errno (SYSTEM), else 0 */
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
    uint8_t flags;  /* enum netbridge_flags. Allocated: 0 */
    uint8_t queue;  /* the queue pair that a frame came from, or is to be sent on, below netbridge_queue_pairs */
    uint16_t reserved;
};
/* A frame of several pieces is pieces in a row, all but the last with MORE, all but the first with CONTINUATION. HEADER,
 * on the first: it has a virtio header. */
enum netbridge_flags { NETBRIDGE_MORE = 1, NETBRIDGE_CONTINUATION = 2, NETBRIDGE_HEADER = 4 };

/* What a frame may leave undone for somebody else to do; the bits are the virtio features of the same names (virtio 1.3
 * §5.1.3). CSUM and HOST_*: the device does it for frames that are sent. GUEST_*: the client can take frames that were
 * never cut, or whose checksum was never made. */
#define NETBRIDGE_CSUM (UINT64_C(1) << 0)
#define NETBRIDGE_GUEST_CSUM (UINT64_C(1) << 1)
#define NETBRIDGE_GUEST_TSO4 (UINT64_C(1) << 7)
#define NETBRIDGE_GUEST_TSO6 (UINT64_C(1) << 8)
#define NETBRIDGE_GUEST_ECN (UINT64_C(1) << 9)
#define NETBRIDGE_HOST_TSO4 (UINT64_C(1) << 11)
#define NETBRIDGE_HOST_TSO6 (UINT64_C(1) << 12)
#define NETBRIDGE_HOST_ECN (UINT64_C(1) << 13)
#define NETBRIDGE_GUEST_USO4 (UINT64_C(1) << 54)
#define NETBRIDGE_GUEST_USO6 (UINT64_C(1) << 55)
#define NETBRIDGE_HOST_USO (UINT64_C(1) << 56)

/* A frame's struct virtio_net_hdr (virtio 1.3 §5.1.6): offsets and lengths in bytes, from the frame's start. */
struct netbridge_header {
    uint8_t flags;    /* 1 NEEDS_CSUM, 2 DATA_VALID (received frames only) */
    uint8_t gso_type; /* 0 none, 1 TCP over IPv4, 4 TCP over IPv6, 5 UDP; with 0x80 ECN */
    uint16_t hdr_len; /* of all headers, in front of what is cut */
    uint16_t gso_size;
    uint16_t csum_start;
    uint16_t csum_offset;
    uint16_t num_buffers;
};

/* Connects to the driver that listens at `path` and takes the port over; `timeout_ms` bounds the handshake. `name`: what
 * the driver's log and counters call this client; 1 to 32 letters, digits, '.', '_' or '-'. `offloads`: those that this
 * client can take (0: frames come and go as they are on the wire); the session has as many of them as the device. NULL:
 * see `failure`, which may be NULL too. */
struct netbridge *netbridge_connect(const char *path, const char *name, uint64_t offloads, int timeout_ms,
                                    struct netbridge_failure *failure);
/* Says BYE, if nobody has, and unmaps everything: no piece is good any more. NULL does no harm. */
void netbridge_close(struct netbridge *port);
/* Why the session has ended, or what the last misuse was; `error` 0 while there was neither. */
const struct netbridge_failure *netbridge_last_failure(const struct netbridge *port);

/* Kept up to date by netbridge_check. */
const struct netbridge_facts *netbridge_facts(const struct netbridge *port);
/* The session's number. */
uint16_t netbridge_session(const struct netbridge *port);
/* The offloads that the session has: some of those that were asked for. */
uint64_t netbridge_offloads(const struct netbridge *port);
/* What a buffer to send has room for, bytes. */
uint32_t netbridge_room(const struct netbridge *port);
/* The longest frame that can be sent, bytes, in netbridge_most_pieces buffers or fewer. */
uint32_t netbridge_largest(const struct netbridge *port);
uint32_t netbridge_most_pieces(const struct netbridge *port);
/* How many RX buffers this client may hold before frames are dropped. */
uint32_t netbridge_rx_limit(const struct netbridge *port);
/* Whether received frames may be written to, for `netbridge_forward`, say: the driver's manifest decides. */
bool netbridge_rx_writable(const struct netbridge *port);
/* How many queue pairs the device has. */
uint32_t netbridge_queue_pairs(const struct netbridge *port);

/* Reads what the driver has said: 0, or an error. Call it when netbridge_wait found NETBRIDGE_WAIT_CONTROL. */
int netbridge_check(struct netbridge *port);

/* Which frames the client wants: all of it, in the place of what it wanted before. A session begins with
 * NETBRIDGE_PROMISCUOUS alone. Start from all zeroes. */
enum netbridge_modes { /* virtio 1.3 §5.1.6.5.1 */
    NETBRIDGE_PROMISCUOUS = 1,
    NETBRIDGE_ALL_MULTICAST = 2,
    NETBRIDGE_ALL_UNICAST = 4,
    NETBRIDGE_NO_MULTICAST = 8,
    NETBRIDGE_NO_UNICAST = 16,
    NETBRIDGE_NO_BROADCAST = 32
};
struct netbridge_filter {
    uint16_t modes;
    uint8_t unicast;           /* how many addresses are stations', besides the device's own */
    uint8_t multicast;         /* how many follow that are groups'; 64 at most in all */
    uint8_t addresses[64][6];  /* stations', then groups'; the rest zeroes */
    uint8_t vlans[512];        /* bit n % 8 of byte n / 8: frames of VLAN n, 0 to 4094 */
};
/* What the driver says of a request that it did not do. */
enum netbridge_verdict {
    NETBRIDGE_NOT_OFFERED = 1, /* the device lacks what it takes */
    NETBRIDGE_INVALID = 2,     /* what was asked for can never be */
    NETBRIDGE_SAID_NO = 3,     /* the device said no */
    NETBRIDGE_FAILED = 4       /* the device did not answer, or wrongly: it is being reset */
};
/* Asks for it, and waits for the answer: 0, or an error. Frames that were on their way may still come. */
int netbridge_set_filter(struct netbridge *port, const struct netbridge_filter *filter, int timeout_ms);
/* Gives the device this MAC address until the session ends: 0, or an error. netbridge_facts has it then. */
int netbridge_set_mac(struct netbridge *port, const uint8_t mac[6], int timeout_ms);

/* Up to `most` received pieces, in order: how many, or an error. A frame's end may come with a later call. */
int netbridge_receive(struct netbridge *port, struct netbridge_piece *pieces, uint32_t most);
/* Gives received pieces back, in any order: 0, or an error. */
int netbridge_release(struct netbridge *port, const struct netbridge_piece *pieces, uint32_t count);
/* Up to `most` buffers to write frames into: how many, or an error. */
int netbridge_allocate(struct netbridge *port, struct netbridge_piece *pieces, uint32_t most);
/* Copies a received frame's header out of its first piece; whether it has one. It says what the device says: check it before
 * you rely on it. */
bool netbridge_get_header(const struct netbridge_piece *piece, struct netbridge_header *header);
/* Puts a header in front of a frame to send, of which this is the first piece, and sets its flag. */
void netbridge_set_header(struct netbridge_piece *piece, const struct netbridge_header *header);
/* Sends allocated buffers, `len` bytes of each: 0, or an error; then none is sent. A frame of 14 to netbridge_largest bytes
 * is one buffer or several in a row, whose flags say so, all in one call and all of one `queue`. */
int netbridge_send(struct netbridge *port, const struct netbridge_piece *pieces, uint32_t count);
/* Sends received frames from where they are, without a copy, in the place of releasing them: the first `len` bytes (14
 * to what a buffer holds, and to netbridge_largest) at `data`, as they stand, on `queue`. 0, or an error; then none is
 * sent. Where netbridge_rx_writable the frame may have been changed before. A frame of several pieces cannot be
 * forwarded, nor one whose virtio header says that there is something to be done yet: both are NETBRIDGE_MISUSE. What
 * is not sent yet counts as held (netbridge_rx_limit). */
int netbridge_forward(struct netbridge *port, const struct netbridge_piece *pieces, uint32_t count);
/* Wakes the driver if it sleeps. Call it once after a burst of release, send and forward. */
void netbridge_flush(struct netbridge *port);

enum netbridge_wait { NETBRIDGE_WAIT_RECEIVE = 1, NETBRIDGE_WAIT_ALLOCATE = 2, NETBRIDGE_WAIT_CONTROL = 4 };
/* Waits until there is something to receive or to allocate, as `wanted` says, or the driver has said something, at most
 * `timeout_ms` (-1: as long as it takes): what was found, 0 for nothing, or an error. A signal ends it early, with 0 or, if
 * that was wanted, NETBRIDGE_WAIT_CONTROL. */
int netbridge_wait(struct netbridge *port, int wanted, int timeout_ms);

/* For event loops: readable after netbridge_arm when what was wanted has come, or the driver has said something. A
 * netbridge_wait takes back what it wanted itself: call netbridge_arm again. */
int netbridge_fd(const struct netbridge *port);
/* Asks the driver to ring for what is `wanted`: what is there already (look at that first, no bell will ring for it), 0
 * when nothing is, or an error. */
int netbridge_arm(struct netbridge *port, int wanted);

#ifdef __cplusplus
}
#endif
#endif
