/* A network device's side of two virtqueues of either format (virtio 1.3 §2.7, §2.8, §5.1), for tests.
 *
 * It shares no definition with the driver: whoever mixes up an offset there must not find the same mix-up here. Every
 * address the driver gives it goes through a table of windows, as through an IOMMU: outside of them, across a buffer's
 * edge, or in the wrong direction is a violation, kept in `violation` for the test to see.
 *
 * By itself it is honest; `lie` makes its next move a lie of that kind, once.
 */
#ifndef FAKE_DEVICE_H
#define FAKE_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Memory the device may reach. `stride`: no access may cross a multiple of it (0: only the window's end counts). */
struct fake_window {
    uint64_t iova;
    uint8_t *at;
    uint64_t bytes;
    uint64_t stride;
    bool readable;
    bool writable;
};

struct fake_segment {
    uint8_t *at;
    uint32_t len;
    uint16_t descriptor;
    bool writable;
};

enum { FAKE_MOST_SEGMENTS = 66, FAKE_MOST_WINDOWS = 8, FAKE_MOST_PIECES = 64 };

/* A chain that the device has taken. */
struct fake_chain {
    uint16_t head;        /* how it is given back: number of its first descriptor, or its buffer id */
    uint16_t descriptors; /* it takes of the ring: one when they are in a table */
    uint16_t segments;
    struct fake_segment segment[FAKE_MOST_SEGMENTS];
};

/* What was agreed about the rings. */
struct fake_features {
    bool packed;
    bool event_idx;
    bool indirect;
    bool in_order; /* the device then says as little as it may: one used element for several chains */
    bool notification_data;
};

/* Where the driver has put a queue: addresses as the device is given them. */
struct fake_queue_place {
    uint64_t descriptors;
    uint64_t driver_area;
    uint64_t device_area;
    uint16_t size;
    volatile uint32_t *notify; /* where the driver's notifications go; the device takes them away */
    int irq_fd;                /* -1: none, or INTx */
    struct fake_features features;
};

struct fake_queue {
    struct fake_queue_place place;
    uint8_t *descriptors;
    uint8_t *driver_area;
    uint8_t *device_area;
    /* Positions: as the ring's indices count (split), or from 0 to twice the size (packed, two laps of the ring). */
    uint16_t available_taken;
    uint16_t used_index;
    uint16_t interrupted; /* the driver's wish for an interrupt was looked at for all before */
    uint16_t *held;       /* by head: ring descriptors of the chain the device has; by descriptor, for a split ring */
    /* A packed descriptor that says it is used, but for its flags. */
    bool withholds;
    uint16_t withheld_at;
    uint16_t withheld_flags;
    /* IN_ORDER: completed chains for which one element will stand. */
    uint16_t batch;
    uint16_t batch_descriptors;
    uint16_t batch_id;
    uint32_t batch_len;
    bool batch_may_grow;
};

enum fake_lie {
    FAKE_HONEST,
    FAKE_ID_OUT_OF_RANGE,
    FAKE_ID_TWICE,
    FAKE_LENGTH_TOO_LONG,
    FAKE_LENGTH_TOO_SHORT,
    FAKE_NUM_BUFFERS_ZERO,
    FAKE_NUM_BUFFERS_TOO_MANY,
    FAKE_NUM_BUFFERS_NEVER_REACHED,
    FAKE_INDEX_JUMP, /* split rings only */
    FAKE_INDEX_BACK, /* split rings only */
    FAKE_LIES
};

struct fake_device {
    struct fake_window windows[FAKE_MOST_WINDOWS];
    unsigned window_count;
    struct fake_queue rx;
    struct fake_queue tx;
    uint32_t header_bytes;
    uint8_t header[16];      /* what stands in front of a frame it delivers, but for num_buffers */
    bool takes_headers;      /* offloads were agreed: a frame's header may ask for something */
    uint8_t sent_header[16]; /* of the frame last collected */
    bool merges; /* MRG_RXBUF was agreed */
    enum fake_lie lie;
    uint64_t interrupts_sent;
    uint64_t interrupts_suppressed;
    /* INTx: a level that VFIO masks when it fires. */
    int intx_fd; /* -1: MSI-X */
    int unmask_fd;
    uint8_t *isr;
    uint8_t isr_pending;
    bool masked;
    char violation[160]; /* the first; empty: none */
};

void fake_window_add(struct fake_device *device, struct fake_window window);
/* DRIVER_OK: the device finds its queues. */
void fake_attach(struct fake_device *device, struct fake_queue *queue, struct fake_queue_place place);
void fake_detach(struct fake_device *device);

/* Where both rings begin, instead of at 0: before anything is made available. */
void fake_start_at(struct fake_queue *queue, uint16_t index);

/* Available chains that the device has not taken. */
uint16_t fake_available(const struct fake_queue *queue);
/* Takes them all without a look at what they are. */
void fake_skip_available(struct fake_queue *queue);
/* Takes the next available chain; false: none, or a violation. */
bool fake_pop(struct fake_device *device, struct fake_queue *queue, struct fake_chain *chain);
/* Writes a used element in the next place; nobody sees it before fake_publish. Any id and length. */
void fake_push(struct fake_queue *queue, uint32_t id, uint32_t len);
/* fake_push for a chain that the device holds, and holds no longer. */
void fake_give_back(struct fake_queue *queue, const struct fake_chain *chain, uint32_t len);
void fake_publish(struct fake_queue *queue);
/* As if the last push, of a chain of one descriptor, had not been, nor the question whether to interrupt for it. */
void fake_unpush(struct fake_queue *queue);
/* Writes any used index: split rings only. */
void fake_set_used_index(struct fake_queue *queue, uint16_t index);
/* Interrupts, unless the driver asked for none. */
void fake_interrupt(struct fake_device *device, struct fake_queue *queue);

/* A whole frame into as many RX buffers as it needs, without interrupting. Buffers used; 0: too few are available. */
unsigned fake_deliver(struct fake_device *device, const uint8_t *frame, uint32_t len);
/* The next frame that the driver sends, copied to `frame` (65,536 bytes of room); `chain` stays the device's. */
bool fake_collect(struct fake_device *device, struct fake_chain *chain, uint8_t *frame, uint32_t *len);
/* fake_give_back for a TX chain, or a lie. */
void fake_complete(struct fake_device *device, const struct fake_chain *chain);

/* Asks for a notification of the next chain, or for none. Turning notifications on throws earlier ones away; then look at the rings, then wait for fake_notified. */
void fake_want_notifications(struct fake_queue *queue, bool wanted);
bool fake_notified(const struct fake_queue *queue);
/* Writes what stands there already over the driver's wish for interrupts, or the device's for notifications, to have it in
 * this processor's cache. */
void fake_touch_interrupts(struct fake_queue *queue);
void fake_touch_notifications(struct fake_queue *queue);

/* The configuration changed: INTx only. */
void fake_config_changed(struct fake_device *device);
/* Sees whether VFIO was told to unmask, and fires again if there is something left to tell. */
void fake_intx_poll(struct fake_device *device);

#endif
