/* A world for the core to live in: memory for three parties that hold each other to their rights, a fake device, a pump
 * and a client.
 *
 * Driver, device and client each have mappings of their own, with the rights they have in a real session: the driver
 * only reads RX buffers (the header) and cannot see TX buffers at all unless it may have to copy from them, the client
 * only reads RX buffers unless it is to be let change them, the device only reads TX buffers. Inaccessible pages lie
 * around every mapping, and AddressSanitizer guards what is left between. Under ThreadSanitizer all share one mapping,
 * since it knows memory by its virtual address.
 */
#ifndef WORLD_H
#define WORLD_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "core.h"
#include "fake_device.h"

enum { SESSION = 0x51e5, HEADER = 12, HEADROOM = 64, STRIDE = 2048, ROOM = STRIDE - HEADROOM, SHORTEST = 14 };

/* Zero members mean the default in brackets. */
struct world_config {
    uint16_t rx_size;         /* RX virtqueue [64] */
    uint16_t tx_size;         /* [64] */
    uint32_t rx_count;        /* buffers [128] */
    uint32_t tx_count;        /* [64] */
    uint32_t max_pieces;      /* [1] */
    uint32_t tx_max_pieces;   /* [1] */
    uint32_t tx_largest_frame; /* [as much as the pieces hold] */
    uint64_t offloads;        /* [none] */
    uint32_t tx_copied;       /* [0: no frame is copied] */
    bool tx_header_with_frame; /* [the header of a frame that asks for nothing is out of the client's reach] */
    uint32_t pairs;           /* [1] */
    uint32_t client_limit;    /* [rx_count] */
    uint32_t burst;           /* [64] */
    uint32_t spin_ns;         /* [0] */
    bool yields;              /* [there is more than one processor] */
    uint64_t stall_ns;        /* [0: no device is ever stuck] */
    uint32_t ring_position;   /* where the ring counts begin [0] */
    uint16_t queue_index;     /* where the virtqueues' indices begin, modulo what they count to [0] */
    struct fake_features ring; /* and those that CORE_RING names [none] */
    uint16_t table_segments;  /* with INDIRECT_DESC [4] */
    bool intx;                /* [MSI-X] */
    bool kicks;               /* notifications by eventfd */
    bool one_vector;          /* both queues on one vector */
    bool rx_writable;         /* the client may change received frames [it can only read them] */
    bool doorbell_is_bare;    /* the client has the driver's eventfd itself [an epoll instance around it] */
};

/* One piece of shared memory as each party has it mapped; NULL where it may not see it. */
struct shared {
    uint8_t *driver;
    uint8_t *device;
    uint8_t *client;
    uint64_t bytes;
};

/* A queue pair beyond the first: the memory of its queues, and a fake device that serves them and no others. */
struct world_pair {
    struct nb_virtqueue_config rx_config, tx_config;
    struct shared rx_memory, tx_memory;
    struct nb_virtqueue *rx_queue, *tx_queue;
    uint32_t rx_notify, tx_notify;
    int irq_fd; /* of both */
    struct fake_device device;
};

struct world {
    struct world_config config;
    struct nb_counters counters;
    struct nb_virtqueue_config rx_config, tx_config;
    struct nb_virtqueue_layout rx_layout, tx_layout;
    struct shared rx, tx, header, rings[4], rx_memory, tx_memory;
    uint32_t rx_notify, tx_notify;
    uint8_t isr;
    int rx_irq_fd, tx_irq_fd, intx_fd, unmask_fd, client_doorbell_fd, driver_doorbell_fd, control_fd, client_control_fd;
    int client_end_of_doorbell_fd;
    struct nb_virtqueue *rx_queue, *tx_queue;
    struct nb_ledger *rx_ledger, *tx_ledger;
    struct nb_pump_config pump_config;
    struct nb_pump *pump;
    struct fake_device device;
    struct world_pair more[NB_MOST_PAIRS - 1];
    struct nb_client client;
    /* the pump's thread */
    pthread_t pump_thread;
    struct nb_pump_result result;
    double pump_cpu_seconds;
    bool pump_came_back;
};

/* Everything up to DRIVER_OK. Any failure fails the case. CORE_RING in the environment names what is agreed about the rings
 * besides what `config` says, as "packed event_idx": so one case serves them all. */
void world_open(struct world *world, struct world_config config);
/* Checks that the device saw no violation and that the books close, then frees everything. */
void world_close(struct world *world);
/* world_close without the checks. */
void world_discard(struct world *world);
void world_check_books(const struct world *world);
/* DRIVER_OK: the first pair's device finds its queues, and is honest. */
void world_attach_device(struct world *world);

/* Runs the pump in this thread until it has nothing more to do: what it came back with (NB_EVENT_CONTROL when idle). */
struct nb_pump_result world_pump(struct world *world);
/* world_pump, and the case fails unless the pump became idle without complaint. */
void world_pump_idle(struct world *world);
/* world_pump, and the case fails unless it came back with just this; checks the counters of faults and refusals too. */
void world_expect_client_fault(struct world *world, enum nb_refusal refusal);
void world_expect_device_fault(struct world *world, enum nb_device_fault fault);

/* The pump in a thread of its own, until control_fd or a fault. */
void world_start_pump(struct world *world);
void world_stop_pump(struct world *world);

/* Frame number `number`: every byte follows from number and position. */
void frame_make(uint8_t *frame, uint64_t number, uint32_t len);
/* Whether it is that frame; `reflected`: with its MAC addresses exchanged. */
bool frame_is(const uint8_t *frame, uint64_t number, uint32_t len, bool reflected);
/* Lengths from SHORTEST to ROOM, every one of them in 1,971 frames. */
uint32_t frame_length(uint64_t number);

/* Delivers frame `number` of `len` bytes and fails the case if the device has no buffer. */
void deliver(struct world *world, uint64_t number, uint32_t len);
/* Receives exactly one frame in one piece, checks it, and leaves it to the caller to release. */
struct nb_piece receive_one(struct world *world, uint64_t number, uint32_t len);
void release_one(struct world *world, struct nb_piece piece);
/* deliver, world_pump_idle, and receive_one: a frame that is the client's. */
struct nb_piece obtain(struct world *world, uint64_t number, uint32_t len);
/* Sends it from where it is, on this pair. */
void forward_on(struct world *world, struct nb_piece piece, uint8_t pair);
/* Allocates a TX buffer, writes frame `number` into it and sends it. */
struct nb_piece send_one(struct world *world, uint64_t number, uint32_t len);
/* Frames that fit the TX queue. */
uint32_t tx_room(const struct world *world);
/* Collects exactly one frame at the device, checks it and completes it. */
void transmit_one(struct world *world, uint64_t number, uint32_t len);

/* What a client that follows no rules writes: an entry as it stands, and a count as it stands. */
enum world_ring { RX_ACTIVE, RX_FREE, TX_ACTIVE, TX_DONE };
void forge_entry(struct world *world, enum world_ring ring, uint32_t position, struct nb_entry entry);
void forge_produced(struct world *world, enum world_ring ring, uint32_t produced);
uint64_t forge_handle(uint16_t session, uint16_t lease, uint8_t region, uint32_t index);

bool is_rung(int doorbell_fd);
double seconds_now(void);

/* The device of a queue pair. */
static inline struct fake_device *device_of(struct world *world, uint32_t pair)
{
    return pair ? &world->more[pair - 1].device : &world->device;
}
/* The device sends a frame of `len` bytes, all of them `fill`, which it reads from so many descriptors. `header`: what is in
 * front of it, HEADER bytes; NULL: one that asks for nothing. */
void world_expect_sent(struct world *world, uint8_t fill, uint32_t len, unsigned descriptors, const void *header);

#endif
