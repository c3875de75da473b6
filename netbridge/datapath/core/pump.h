/* The pump's inside, shared by the files it is made of:
 *
 *     receive.c   device to client, and the buffers back
 *     transmit.c  client to device
 *     complete.c  the buffers back, when the device has sent what was in them
 *     wake.c      going to sleep, being woken, waking others
 *     watchdog.c  whether the device is stuck
 *     recover.c   a reset of the device under the session
 *     pump.c      the rounds of these, making and freeing
 *
 * Every function that moves something returns how much it moved, or a negative verdict: see CLIENT_FAULT and DEVICE_FAULT.
 */
#ifndef NB_PUMP_H
#define NB_PUMP_H

#include <stdbool.h>
#include <stdint.h>

#include "core.h"
#include "ledger.h"
#include "net_header.h"
#include "polling.h"
#include "port_ring.h"
#include "tx_slot.h"
#include "virtqueue.h"

enum { ETHERNET_HEADER = 14, NO_BUFFER = UINT32_MAX };

/* Received chains that are taken at once, and their headers fetched: by the time the last is taken, the first is there. */
enum { TAKEN_AT_ONCE = 32 };

/* On one processor: how long a client that holds all it may is waited for, before frames are dropped for want of it. */
enum { CLIENT_PATIENCE_MS = 500 };

/* A negative verdict carries what happened: the enum nb_refusal or enum nb_device_fault is recovered from it. */
enum { CLIENT_FAULT = -1000, DEVICE_FAULT = -2000 };
static inline int client_fault(int refusal) { return CLIENT_FAULT - refusal; }
static inline int device_fault(int fault) { return DEVICE_FAULT - fault; }

/* A buffer of a received frame. */
struct rx_piece {
    uint32_t buffer;
    uint32_t bytes;
};

/* What is known of a buffer that the client has sent, until the device is done with it. Private, indexed by the
 * buffer's number among those that can be sent: the TX buffers, and behind them the RX buffers, each of which is a
 * forwarded frame. */
struct tx_piece {
    uint32_t next;  /* the frame's next piece; NO_BUFFER: this is its last, or it is with nobody but the client */
    uint32_t bytes; /* in this piece */
    /* Of a frame's first piece: */
    uint32_t following; /* in a backlog: first piece of the frame behind it, or NO_BUFFER */
    uint16_t pieces;
    bool has_header;
};

/* A sent chain's token is the number of its frame's first buffer, beside which this says to look for the others in
 * tx_pieces: a frame of one piece needs no look there. NO_BUFFER: a forwarded frame was copied, and its buffer is long
 * since free. */
enum { HAS_MORE_PIECES = 2 * MOST_BUFFERS };

/* A frame whose last piece has not come yet, or has just come. No pieces: there is none. */
struct tx_frame {
    uint32_t first;
    uint32_t last;
    uint32_t pieces;
    uint32_t bytes;
    uint8_t queue;
    bool has_header;
};

struct pump_pair {
    struct nb_virtqueue *rx_queue;
    struct nb_virtqueue *tx_queue;
    uint8_t number; /* as ring entries name it */
    uint32_t first_slot; /* of those for copies of forwarded frames, one for each that may be in flight on this pair */
    struct rx_piece pieces[NB_MOST_PIECES]; /* of the frame being gathered */
    uint32_t pieces_gathered;
    uint32_t pieces_expected; /* 0: between frames */
    /* Frames that the queue has no room for, in order: linked by `following`. Nothing more is taken for this pair as long
     * as there are some, unless it comes behind what is for another. */
    uint32_t backlog_first;
    uint32_t backlog_last;
    uint32_t completed;        /* frames sent on this pair, ever; for the watchdog */
    uint32_t completed_before; /* and when it last looked */
    uint64_t stalled_since;    /* frames are in flight and none was completed since; 0: none are, or nobody has looked */
    uint32_t completed_at_reset; /* when the transmit queue was last reset alone */
    bool was_reset;              /* it ever was */
};

struct nb_pump {
    struct nb_pump_config config;
    int epoll_fd;
    uint32_t rx_active_put;
    uint32_t rx_free_taken;
    uint32_t tx_active_taken;
    uint32_t tx_done_put;
    uint32_t rx_active_told; /* up to where it is known whether the client had to be woken */
    uint32_t tx_done_told;
    uint32_t client_left_asking; /* wishes that it had besides the one for which it was last woken */
    uint32_t turn;       /* which pair goes first; moves on with every round */
    uint32_t rx_share;   /* chains a pair's RX queue may hold, so that there are buffers for the others too */
    uint32_t rx_may_hold; /* RX buffers the client may hold: its limit, less what it forwarded and the device has not sent */
    uint32_t longest_forwarded; /* bytes */
    uint8_t rx_flags;    /* of a received frame's first entry: NB_HEADER if the session has offloads there */
    bool tx_has_offloads;
    bool holds_back;        /* the last round left received frames with the device, for the client to catch up */
    bool client_is_late;    /* it was waited for in vain, and has given nothing back since */
    uint64_t awaited_since; /* holds_back, and nothing came back since then; 0: neither */
    uint64_t doorbell_ns; /* when the client's bell was last rung; 0: its wake-up was accounted for */
    uint32_t stalled;     /* the pair of which the watchdog last said so */
    struct polling polling;
    struct tx_frame gathered; /* the frame that the client is sending */
    uint8_t kept_header[NB_NET_HEADER_BYTES]; /* of that frame, while the device is reset */
    struct tx_piece *tx_pieces;
    struct pump_pair pairs[NB_MOST_PAIRS];
};

static inline struct pump_pair *pair_in_turn(struct nb_pump *pump, uint32_t i)
{
    uint32_t number = pump->turn + i;
    return &pump->pairs[number < pump->config.pair_count ? number : number - pump->config.pair_count];
}

/* The client has given up RX buffers, or the device those that were forwarded: whoever waited for that has waited in
 * vain no longer. */
static inline void pump_note_return(struct nb_pump *pump)
{
    pump->client_is_late = false;
    pump->awaited_since = 0;
}

/* The number among buffers that can be sent. */
static inline uint32_t number_of_forwarded(const struct nb_pump *pump, uint32_t rx_buffer)
{
    return pump->config.tx_ledger->region.count + rx_buffer;
}

/* Where the device reads the header of a sent frame that has one, by the frame's first buffer. */
static inline struct net_header *tx_header_of(const struct nb_pump *pump, uint32_t first)
{
    return (struct net_header *)(void *)(pump->config.tx_slots + tx_slot_offset(1 + first));
}

/* Publishes what was added to a queue, and tells the device if it wants to be told. */
void pump_notify(struct nb_pump *pump, struct nb_virtqueue *queue);
/* Posts what buffers there are, for a device that looks from DRIVER_OK on; the notification comes with the first round. */
void pump_show_free_buffers(struct nb_pump *pump);
/* Which of tx_slots are whose, with the queues as they are. */
void pump_place_slots(struct nb_pump *pump);

/* watchdog.c: 0, or a verdict; and how long the pump may sleep until the next look, -1: for ever. */
int pump_look_for_stall(struct nb_pump *pump, int *timeout_ms);

/* receive.c */
int pump_receive(struct nb_pump *pump, struct pump_pair *pair);
int pump_take_back(struct nb_pump *pump);
void pump_post_free_buffers(struct nb_pump *pump);
/* Gives up the frame that is being gathered. */
void pump_forget_gathered(struct nb_pump *pump, struct pump_pair *pair);
/* Whether the device soon has no buffer for a frame, so that those that come back cannot wait. */
bool pump_device_starves(const struct nb_pump *pump);

/* transmit.c */
int pump_transmit(struct nb_pump *pump);
/* Whether there is a queue for whatever the client sends next, as far as can be known before it is looked at. */
bool pump_can_transmit(const struct nb_pump *pump);

/* complete.c */
int pump_complete(struct nb_pump *pump, struct pump_pair *pair);
void pump_acknowledge(struct nb_pump *pump, uint32_t buffer);
/* The device is done with a frame, or has lost it: all its buffers, by its chain's token. */
void pump_acknowledge_frame(struct nb_pump *pump, uint32_t token);

/* wake.c */
int pump_watch_fds(struct nb_pump *pump);
/* Wakes the client if it waits for something that has been published since it was last looked at. Whether it was woken. */
bool pump_wake_client(struct nb_pump *pump);
/* The same, but not necessarily for buffers as long as more are to come: before sleeping, or returning, tell it all. */
void pump_wake_client_soon(struct nb_pump *pump);
/* It has not asked to be woken since it last was: it works, or wants the processor to. As far as can be known. */
bool pump_client_is_awake(const struct nb_pump *pump);
void pump_stop_asking(struct nb_pump *pump);
bool pump_ask_for_wakeup(struct nb_pump *pump);
int pump_look_at_fds(struct nb_pump *pump, int timeout_ms);

#endif
