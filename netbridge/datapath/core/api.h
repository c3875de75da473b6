/* What Python and the C core both see of the data path: plain declarations, in three parts: the port's shared memory,
 * the driver's side, the client's side.
 *
 * cffi reads this file as it stands (C includes it through core.h), so it holds no preprocessor lines and no alignment
 * attributes; padding is spelt out and checked in layout.c.
 */

/* ---- The port: what driver and client share (docs/port.md) ---------------------------------------------------- */

/* The kinds of a ring entry. */
enum nb_kind { NB_RX_PACKET = 1, NB_TX_PACKET = 2, NB_TX_PACKET_ACK = 3 };

/* Flags of a ring entry. MORE: the frame goes on in the next entry. CONTINUATION: this buffer goes on with a frame that
 * began in an earlier entry; of a received frame its bytes start at `continuation_offset` instead of `headroom`. HEADER: the
 * NB_NET_HEADER_BYTES in front of the frame are its virtio_net_hdr; only in a frame's first entry, and only if the session
 * has offloads in that direction. */
enum nb_entry_flag { NB_MORE = 1, NB_CONTINUATION = 2, NB_HEADER = 4 };

/* Bits of `offloads`: those of the virtio features of the same names (virtio 1.3 §5.1.3). */
enum nb_offload {
    NB_CSUM = 0,
    NB_GUEST_CSUM = 1,
    NB_GUEST_TSO4 = 7,
    NB_GUEST_TSO6 = 8,
    NB_GUEST_ECN = 9,
    NB_HOST_TSO4 = 11,
    NB_HOST_TSO6 = 12,
    NB_HOST_ECN = 13,
    NB_GUEST_USO4 = 54,
    NB_GUEST_USO6 = 55,
    NB_HOST_USO = 56
};

/* NET_HEADER_BYTES: of struct virtio_net_hdr with num_buffers (virtio 1.3 §5.1.6). TX_SLOT_BYTES: of the driver's private
 * memory for one sent frame (tx_slot.h). TX_MOST_COPIED: of a frame, as fit there. MOST_PIECES: buffers of one frame, more
 * than 64 KiB need. MOST_PAIRS: receive and transmit queues of one device. */
enum { NB_NET_HEADER_BYTES = 12, NB_TX_SLOT_BYTES = 256, NB_TX_MOST_COPIED = 192, NB_MOST_PIECES = 64, NB_MOST_PAIRS = 8 };

/* Regions a DMA handle can name. */
enum nb_region_id { NB_REGION_RX = 1, NB_REGION_TX = 2 };

/* One message: 16 bytes, little-endian. `len` is bytes of frame in this buffer (0 when an RX buffer is given back). In
 * tx_active the handle may be of the RX region: that frame is sent from where it was received. */
struct nb_entry {
    uint64_t dma_handle; /* session:16 | lease:16 | region:8 | index:24, most significant first */
    uint32_t len;
    uint16_t kind;
    uint8_t flags;
    uint8_t queue; /* the queue pair that a frame came from, or is to be sent on; 0 elsewhere */
};

/* The head of a ring; `slots` entries follow it. Each side writes only its own cache line. The counts run freely and
 * wrap at 2^32. */
struct nb_ring_header {
    uint32_t produced; /* producer: entries ever put in */
    uint32_t reserved0;
    uint64_t doorbell_ns; /* producer: CLOCK_MONOTONIC at its last doorbell */
    uint8_t pad0[48];
    uint32_t consumed; /* consumer: entries ever taken out */
    uint32_t wake;     /* consumer: 1 = about to sleep, ring the doorbell after the next entry; the producer clears it
                        * before it rings, so that one sleep costs one doorbell */
    uint64_t woken_ns; /* consumer: CLOCK_MONOTONIC when a doorbell last woke it */
    uint8_t pad1[48];
};

/* ---- Counters: pages that an outside process may read --------------------------------------------------------- */

/* Why a frame did not go on. */
enum nb_drop {
    NB_DROP_CLIENT_SLOW, /* the client holds as many RX buffers as it may */
    NB_DROP_TOO_SHORT,   /* the device delivered less than an Ethernet header */
    NB_DROP_DEVICE_RESET, /* it was on its way when the device had to be reset */
    NB_DROPS
};

/* Why a client's entry was refused; any of them ends its session. */
enum nb_refusal {
    NB_REFUSE_RING_JUMP, /* the ring's `produced` ran ahead by more than the ring holds */
    NB_REFUSE_KIND,      /* an entry of a kind that does not belong in this ring, or unknown flags */
    NB_REFUSE_REGION,    /* a handle of the other region, or of none */
    NB_REFUSE_INDEX,     /* a handle beyond the region's last buffer */
    NB_REFUSE_SESSION,   /* a handle of an earlier session */
    NB_REFUSE_LEASE,     /* a handle that was already given back */
    NB_REFUSE_OWNER,     /* a buffer that is not the client's at the moment */
    NB_REFUSE_LENGTH,    /* a piece that is empty or longer than its buffer; a frame shorter than an Ethernet header or
                          * longer than was agreed */
    NB_REFUSE_PIECES,    /* a continuation without a beginning, a beginning before the end, more pieces than were agreed */
    NB_REFUSE_HEADER,    /* a virtio header that asks for what was not agreed, or does not fit its frame */
    NB_REFUSE_QUEUE,     /* a queue pair that is not there, or another one than the frame began with */
    NB_REFUSALS
};

/* What a device did that no device may do; any of them makes the device be reset. */
enum nb_device_fault {
    NB_FAULT_USED_JUMP,   /* used index ran ahead by more than is in flight */
    NB_FAULT_USED_ID,     /* used id out of range, or not in flight */
    NB_FAULT_USED_LENGTH, /* used length longer than the buffer, or shorter than the header */
    NB_FAULT_NUM_BUFFERS, /* a merged frame of no buffers, or of more than may be in one */
    NB_FAULT_STALLED,     /* frames were given to it to be sent, and for too long it has completed none */
    NB_FAULTS
};

/* The stages of an interrupt's way: eventfd triggered to waiter awake (VFIO loop-back); waiter awake to queues drained;
 * doorbell rung to client awake. */
enum nb_latency_stage { NB_LATENCY_DELIVERY, NB_LATENCY_DRAIN, NB_LATENCY_CLIENT, NB_LATENCY_STAGES };

/* Why a device was reset under a session that went on. */
enum nb_recovery {
    NB_RECOVERY_NEEDS_RESET, /* it asked for it (virtio 1.3 §2.1.2) */
    NB_RECOVERY_FAULT,       /* it did what no device may: an enum nb_device_fault but the next one */
    NB_RECOVERY_STALLED,     /* a queue did not move */
    NB_RECOVERY_CONTROL,     /* a command was not answered, or wrongly */
    NB_RECOVERY_CONFIG,      /* its configuration was none, or never held still */
    NB_RECOVERIES
};

/* Nanoseconds in buckets of a quarter power of two: bucket = 4*floor(log2 v) + next two bits; v < 4 in bucket v. */
struct nb_histogram {
    uint64_t count;
    uint64_t sum_ns;
    uint64_t max_ns;
    uint64_t buckets[160];
};

/* What one client, by the name of its HELLO, made of its sessions. A name of zeroes: not used. */
struct nb_client_counters {
    uint8_t name[32]; /* padded with zeroes */
    uint64_t sessions;
    uint64_t client_slow; /* frames dropped because it held as many RX buffers as it may */
};

/* What device and driver have agreed on, and what the device says of itself. `features_offered` is written last, and 0
 * while the device is not configured. */
struct nb_device_state {
    uint64_t features_offered; /* bit masks (virtio 1.3 §2.2) */
    uint64_t features_wanted;
    uint64_t features_agreed;
    uint64_t features_turned_off; /* by the user */
    uint32_t speed_mbps;          /* 0: not known */
    uint16_t mtu;
    uint16_t queue_pairs; /* in use */
    uint8_t mac[6];
    uint8_t link_up;
    uint8_t duplex; /* 0: half, 1: full, else not known */
};

/* One writer, the thread in the pump; readers take what they see. */
struct nb_counters {
    uint64_t magic; /* "NBCOUNT1", little-endian */
    uint64_t size;  /* sizeof(struct nb_counters) */
    uint64_t exported; /* bit n: the manifest lists metric n (netbridge/vnode/metric_names.py) */
    uint64_t packets_rx;
    uint64_t packets_tx;
    uint64_t bytes_rx;
    uint64_t bytes_tx;
    uint64_t drops[3];
    uint64_t refused_handles[11];
    uint64_t device_faults[5];
    uint64_t sessions;
    uint64_t resets;
    uint64_t queue_resets;         /* of one queue, while the others went on (RING_RESET) */
    uint64_t recoveries[5];        /* sessions that went on over a reset of the device, or of one of its queues */
    uint64_t recoveries_failed;    /* sessions that did not */
    uint64_t link_changes;
    uint64_t interrupts;
    uint64_t wakeups_sent;
    uint64_t wakeups_suppressed;
    uint64_t notifications_sent;       /* to the device: doorbell writes */
    uint64_t notifications_suppressed; /* to the device: it asked for none */
    uint64_t sleeps;
    uint64_t rx_bursts[12]; /* bursts that held 2^i to 2^(i+1)-1 frames */
    uint64_t tx_bursts[12];
    struct nb_histogram irq_latency_ns[3];
    struct nb_histogram recovery_ns; /* from noticing to frames flowing again */
    struct nb_client_counters clients[16]; /* the last is everybody's for whom there was no place */
    struct nb_device_state device;
};

/* ---- The driver's side ---------------------------------------------------------------------------------------- */

/* A virtqueue (virtio 1.3 §2.6). Opaque: nb_virtqueue_new/free. */
struct nb_virtqueue;
/* A region's buffers and who owns each of them. Opaque: nb_ledger_new/free. */
struct nb_ledger;
/* Everything that one pump call needs. Opaque: nb_pump_new/free. */
struct nb_pump;

enum nb_owner { NB_OWNER_DRIVER, NB_OWNER_DEVICE, NB_OWNER_CLIENT, NB_OWNERS };

/* What device and driver agreed on about their rings (virtio 1.3 §6). */
enum nb_ring_feature {
    NB_RING_PACKED = 1,
    NB_RING_EVENT_IDX = 2,
    NB_RING_IN_ORDER = 4,
    NB_RING_NOTIFICATION_DATA = 8
};

/* A virtqueue to be made. */
struct nb_virtqueue_config {
    uint16_t index;          /* the device's number for it */
    uint16_t size;           /* entries; of a split one a power of two; 32768 at most */
    uint16_t table_segments; /* INDIRECT_DESC: segments of the longest chain that takes one descriptor, `size` at most; 0:
                              * not agreed */
    uint16_t features;       /* enum nb_ring_feature, or-ed */
    void *memory;            /* zeroed, `layout.bytes` long */
    uint64_t iova;           /* where the device sees `memory` */
    volatile void *notify;   /* where the device is notified, 16 bits wide, 32 with NOTIFICATION_DATA */
    int kick_fd;             /* eventfd to notify by instead (vhost-user), or -1 */
};

/* Where its parts lie, as byte offsets into its memory. */
struct nb_virtqueue_layout {
    uint64_t desc;   /* descriptor area */
    uint64_t driver; /* driver area: available ring, or event suppression structure */
    uint64_t device; /* device area: used ring, or event suppression structure */
    uint64_t tables; /* of INDIRECT_DESC, `table_segments` descriptors for each entry of the queue */
    uint64_t bytes;  /* of the whole */
};
/* Of the configuration `size`, `table_segments` and `features` matter. -1: these cannot be. */
int nb_virtqueue_layout(const struct nb_virtqueue_config *config, struct nb_virtqueue_layout *layout);

/* NULL: out of memory, or there is no layout for it. `memory`, `notify` and `kick_fd` stay the caller's, who keeps them longer. */
struct nb_virtqueue *nb_virtqueue_new(const struct nb_virtqueue_config *config);
void nb_virtqueue_free(struct nb_virtqueue *queue);
/* Chains that the device has. */
uint16_t nb_virtqueue_in_flight(const struct nb_virtqueue *queue);
/* With NOTIFICATION_DATA: what is written to notify the device of everything added so far (virtio 1.3 §2.9). */
uint32_t nb_virtqueue_notification(const struct nb_virtqueue *queue);
/* As new, memory and all, after the device was told to forget it. Puts the tokens of the chains that were in flight into
 * `tokens`, room for `size` of them, in no particular order, and returns how many they are. */
uint32_t nb_virtqueue_reset(struct nb_virtqueue *queue, uint32_t *tokens);

/* The control queue: shows the device a chain of a command that it reads and room for an answer that it writes, and notifies
 * it. 0; -1: the last one has not come back. */
int nb_control_submit(struct nb_virtqueue *queue, uint64_t command_iova, uint32_t command_bytes, uint64_t answer_iova,
                      uint32_t answer_bytes);
/* 1: it came back, with so many bytes written; 0: not yet; or -1 - the enum nb_device_fault. */
int nb_control_poll(struct nb_virtqueue *queue, uint32_t *written);

/* Geometry of a region: `count` buffers of `stride` bytes from `base`, reached by the device at `iova`. */
struct nb_region {
    uint8_t *base;
    uint64_t iova;
    uint32_t count;
    uint32_t stride;
    uint32_t headroom; /* where a frame starts in its buffer */
    uint16_t session;  /* part of every handle */
    uint8_t id;        /* enum nb_region_id */
};
struct nb_ledger *nb_ledger_new(const struct nb_region *region);
void nb_ledger_free(struct nb_ledger *ledger);
uint32_t nb_ledger_owned(const struct nb_ledger *ledger, int owner);

/* One ring of the port as mapped in this process. `slots` is a power of two. */
struct nb_ring_place {
    struct nb_ring_header *header;
    uint32_t slots;
};

/* receiveqN and transmitqN (virtio 1.3 §5.1.2), and the eventfds of their MSI-X vectors: -1 with INTx. Queues may share a
 * vector. */
struct nb_pump_pair {
    struct nb_virtqueue *rx_queue;
    struct nb_virtqueue *tx_queue;
    int rx_irq_fd;
    int tx_irq_fd;
};

struct nb_pump_config {
    struct nb_pump_pair pairs[8];
    uint32_t pair_count; /* 1 to NB_MOST_PAIRS */
    struct nb_ledger *rx_ledger;
    struct nb_ledger *tx_ledger;
    struct nb_ring_place rx_active;
    struct nb_ring_place rx_free;
    struct nb_ring_place tx_active;
    struct nb_ring_place tx_done;
    /* Slots of sent frames, in memory that no client sees: NB_TX_SLOT_BYTES each, zeroed and aligned to 64 bytes. The
     * first stays so, its header is that of every frame that asks for nothing; with offloads on the transmit side, or
     * frames that are copied, one more for each TX buffer; if frames are copied, then one for each entry of each
     * transmit queue, for those that are forwarded. */
    uint8_t *tx_slots;
    uint64_t tx_slots_iova;
    uint32_t tx_copied; /* frames up to so many bytes take one descriptor, for a copy behind its header (tx_slot.h);
                         * NB_TX_MOST_COPIED at most. 0: none is copied */
    uint32_t tx_header_with_frame; /* not 0: the client is trusted with the header of a frame that is in one piece and asks
                                    * for nothing: zeroes in front of it, in its buffer, and one descriptor for both */
    uint64_t offloads;         /* 1 << enum nb_offload: what device and client agreed on */
    uint32_t net_header_bytes; /* in front of every frame, both ways */
    uint32_t rx_max_pieces;    /* buffers one received frame may span; 1: MRG_RXBUF was not agreed */
    uint32_t rx_client_limit;  /* RX buffers the client may hold, those it forwards included until they are sent; beyond that
                                * frames are dropped */
    uint32_t tx_max_pieces;    /* buffers one sent frame may span; each queue must be longer by one */
    uint32_t tx_largest_frame; /* bytes of the longest frame that may be sent, without the virtio header */
    uint32_t burst;            /* chains of each queue, and entries of each ring, moved in a round */
    uint32_t spin_ns;          /* poll at most this long after the last work before sleeping */
    uint32_t yields;           /* not 0: there is one processor, so whoever is waited for runs only when we do not */
    uint64_t stall_ns;         /* a device that has frames to send and completes none for so long is stuck; 0: never */
    int intx_fd;                  /* eventfd of INTx, or -1 */
    int intx_unmask_fd;           /* eventfd that VFIO unmasks INTx on, or -1 */
    volatile uint8_t *isr_status; /* ISR status register (virtio 1.3 §4.1.4.5), read once per INTx */
    int client_doorbell_fd;       /* eventfd: client to driver */
    int driver_doorbell_fd;       /* eventfd: driver to client; one that no client can get at, or it could make it block */
    int control_fd;               /* epoll fd (or any fd) that returns to the caller when it becomes readable */
    struct nb_counters *counters;
    struct nb_client_counters *client_counters; /* the client's own; NULL: none */
};

/* Why nb_pump_run came back. */
enum nb_event {
    NB_EVENT_CONTROL = 1,   /* control_fd is readable */
    NB_EVENT_CONFIG,        /* the ISR says that the configuration changed (INTx only) */
    NB_EVENT_CLIENT_FAULT,  /* the client broke the protocol; `detail` is an enum nb_refusal */
    NB_EVENT_DEVICE_FAULT,  /* the device did; `detail` is an enum nb_device_fault */
    NB_EVENT_SYSTEM_ERROR   /* a system call failed; `detail` is the errno */
};
struct nb_pump_result {
    int event;
    int detail;
};

/* NULL: out of memory, or epoll cannot be had. Takes nothing over: the caller keeps every fd and object open longer. */
struct nb_pump *nb_pump_new(const struct nb_pump_config *config);
void nb_pump_free(struct nb_pump *pump);
/* Posts all RX buffers and puts all TX buffers into tx_done: before DRIVER_OK, once. Does not notify the device. */
void nb_pump_prime(struct nb_pump *pump);
/* After the device was reset, and before its queues are freed: takes back all that it held, as far as it had not completed
 * it. Returns how many frames were lost. The pump must not run again before nb_pump_resume. */
uint64_t nb_pump_salvage(struct nb_pump *pump);
/* Gives the device its new queues, as nb_pump_new and nb_pump_prime did, before DRIVER_OK. -1: they do not suit the session:
 * another number of pairs, other vectors, or too short. `tx_slots` as in nb_pump_config, zeroed. */
int nb_pump_resume(struct nb_pump *pump, const struct nb_pump_pair *pairs, uint32_t pair_count, uint8_t *tx_slots,
                   uint64_t tx_slots_iova);
/* After NB_FAULT_STALLED: the pair whose transmit queue did not move; -1: that queue was reset alone, and has sent nothing
 * since. */
int nb_pump_stalled_pair(const struct nb_pump *pump);
/* The device has let go of one of the queues (RING_RESET): what it had completed counts as done; its other RX buffers are the
 * driver's again, its other TX buffers go back to the client, their frames unsent. The queue is as new, to be set up and
 * enabled again; the next round fills it. Returns how many frames were lost; -1: out of memory, or the queue is none of the
 * pump's. */
int nb_pump_reset_queue(struct nb_pump *pump, struct nb_virtqueue *queue);
/* Moves frames until there is an event. Runs without the GIL. */
void nb_pump_run(struct nb_pump *pump, struct nb_pump_result *result);

void nb_histogram_add(struct nb_histogram *histogram, uint64_t nanoseconds);

/* ---- The client's side ---------------------------------------------------------------------------------------- */

/* A frame whose last piece has not come yet. */
struct nb_capture_partial {
    uint32_t length;   /* bytes of the frame */
    uint32_t captured; /* bytes kept of them */
    uint8_t data[131072];
};
/* A file that a client's frames go to, as pcapng packet blocks: timestamps in nanoseconds, of the moment that the client
 * took or gave the frame. Large: not for the stack. */
struct nb_capture {
    int fd;               /* blocking; a write that fails ends the capture, not the client */
    uint32_t interface;   /* number of the interface block that describes this session */
    uint32_t snap_length; /* bytes to keep of a frame, at most 131072 */
    int error;            /* errno of the write that failed; 0 */
    uint64_t received;    /* frames captured, by direction */
    uint64_t sent;
    /* private from here on */
    uint32_t used;
    struct nb_capture_partial partial[2];
    uint8_t buffer[262144];
};

/* The session as a client has it mapped. Plain: the caller fills it from WELCOME, then calls nb_client_init. */
struct nb_client {
    struct nb_ring_place rx_active;
    struct nb_ring_place rx_free;
    struct nb_ring_place tx_active;
    struct nb_ring_place tx_done;
    uint8_t *rx_base;
    uint8_t *tx_base;
    bool rx_writable; /* received frames may be changed where they are */
    uint32_t rx_count;
    uint32_t tx_count;
    uint32_t rx_stride;
    uint32_t tx_stride;
    uint32_t headroom;
    uint32_t continuation_offset;
    uint32_t tx_largest_frame;
    uint32_t tx_max_pieces;
    uint32_t queue_pairs;
    uint64_t offloads;
    int client_doorbell_fd; /* rung by the client */
    int driver_doorbell_fd; /* rung by the driver: an epoll instance around the driver's eventfd, or an eventfd */
    struct nb_histogram *wakeups; /* doorbell rung to client awake; NULL: not wanted */
    struct nb_capture *capture;   /* frames received and sent are written there; NULL: not wanted */
    /* private from here on */
    uint32_t rx_active_taken;
    uint32_t rx_free_put;
    uint32_t tx_active_put;
    uint32_t tx_done_taken;
    uint32_t rx_unreceived; /* pieces that are to be received again: they were captured */
    bool rx_frame_open;     /* the end of a received frame has not come yet */
    uint64_t doorbells_sent;
    uint64_t doorbells_suppressed;
    int wait_fd;    /* epoll: the driver's doorbell, and what nb_client_watch names */
    int watched_fd; /* -1: nothing but the doorbell */
};

/* A frame's piece as the client sees it: `data` points into DMA memory and is the client's until it gives `dma_handle`
 * back (RX) or sends it (TX). With NB_HEADER in `flags` the virtio header is the NB_NET_HEADER_BYTES in front of `data`. */
struct nb_piece {
    uint64_t dma_handle;
    uint8_t *data;
    uint32_t len; /* RX: bytes of frame here; TX: room on allocation, bytes to send on sending */
    uint8_t flags;  /* enum nb_entry_flag; 0 on allocation */
    uint8_t queue;  /* which pair a frame came from, or is to be sent on */
    uint16_t reserved;
};

/* 0; -1: the geometry does not hold together; or -2: the system does not let the doorbell be waited for (errno). */
int nb_client_init(struct nb_client *client);
/* Gives back what nb_client_init took of the system; the memory and the other file descriptors stay the caller's. */
void nb_client_close(struct nb_client *client);
/* Up to `most` received pieces, in order: those of one frame in a row, all but the last with NB_MORE, all but the first with
 * NB_CONTINUATION. -1: the driver wrote what no driver may. */
int nb_client_receive(struct nb_client *client, struct nb_piece *pieces, uint32_t most);
/* Undoes the reception of the last `count` pieces, back to the beginning of a frame, none of which was released: they will
 * be received next. */
void nb_client_unreceive(struct nb_client *client, uint32_t count);
/* Gives RX buffers back. */
void nb_client_release(struct nb_client *client, const struct nb_piece *pieces, uint32_t count);
/* Up to `most` free TX buffers; -1 as above. */
int nb_client_allocate(struct nb_client *client, struct nb_piece *pieces, uint32_t most);
/* Undoes the last `count` allocations, none of which was sent: these buffers will be allocated next. */
void nb_client_unallocate(struct nb_client *client, uint32_t count);
/* Sends TX buffers: `len`, `flags` and `queue` set by the caller. A frame of several is sent in as many calls as it pleases;
 * the device gets it after its last piece. */
void nb_client_send(struct nb_client *client, const struct nb_piece *pieces, uint32_t count);
/* Sends received frames of one piece each from where they are, in the place of releasing them: the `len` bytes at
 * `data` as they stand, on `queue`; other flags than NB_HEADER there must not be, and the header is not sent. */
void nb_client_forward(struct nb_client *client, const struct nb_piece *pieces, uint32_t count);
/* Rings the driver's bell if it sleeps. Call once after a burst of release, send and forward. */
void nb_client_flush(struct nb_client *client);

/* What nb_client_wait may wait for, and what it found. */
enum nb_client_wait { NB_WAIT_RECEIVE = 1, NB_WAIT_ALLOCATE = 2, NB_WAIT_CONTROL = 4, NB_WAIT_FAILED = 8 };
/* From now on `control_fd` ends every wait as soon as it is readable; -1: nothing but frames and buffers does. It stays the
 * caller's, who names another before closing it. Returns what was watched before, for who wants to restore it; or
 * NB_WATCH_FAILED (errno), and does nothing when that is given. */
enum { NB_WATCH_FAILED = -2 };
int nb_client_watch(struct nb_client *client, int control_fd);
/* Sleeps until one of `wanted` is there, or what is watched is readable; 0 after `timeout_ms` (-1: never). */
int nb_client_wait(struct nb_client *client, int wanted, int timeout_ms);

struct nb_echo_counts {
    uint64_t frames;
    uint64_t bytes;
    uint64_t bursts;
    uint64_t unsendable; /* frames longer than the session lets a client send */
    uint64_t forwarded;  /* of `frames`, those that were sent from where they were; the others were copied */
};
/* The echo service's loop: every frame back to its sender with the MAC addresses exchanged, until `control_fd` becomes
 * readable (0), the driver breaks the protocol (-1), or the system lets nobody wait (-2, errno). */
int nb_client_echo(struct nb_client *client, int control_fd, struct nb_echo_counts *counts);

/* The capture service's loop: takes frames, has `client->capture` write them, and gives them back, until `control_fd`
 * becomes readable (0), `most` frames were captured or the file takes no more (1; see `capture->error`), the driver
 * breaks the protocol (-1), or the system lets nobody wait (-2, errno). */
int nb_client_capture(struct nb_client *client, int control_fd, uint64_t most);

/* A TAP device behind the port, and what went through it in all sessions. */
struct nb_tap {
    int fd;             /* IFF_NO_PI, IFF_VNET_HDR with NB_NET_HEADER_BYTES (little-endian), O_NONBLOCK */
    int error;          /* errno that ended the loop */
    uint64_t frames_in; /* from the port into the TAP device */
    uint64_t bytes_in;
    uint64_t frames_out; /* from the TAP device to the port */
    uint64_t bytes_out;
    uint64_t refused;     /* frames that the TAP device did not take */
    uint64_t too_long;    /* frames from the TAP device that are longer than the session lets a client send */
    uint64_t bad_headers; /* frames, of either direction, whose virtio header is none that the session can have */
    /* private: pieces of a frame that has not come whole; 0 them at a session's beginning */
    uint32_t pieces;
    struct nb_piece partial[64];
};
/* The tap service's loop: frames between the port and the TAP device, until `control_fd` becomes readable (0), the driver
 * breaks the protocol (-1), or the device fails (-2, and `error`). */
int nb_client_tap(struct nb_client *client, struct nb_tap *tap, int control_fd);
