/* Between fake_ring_*.c and fake_device.c. */
#ifndef FAKE_RING_H
#define FAKE_RING_H

#include "fake_device.h"

void fake_violated(struct fake_device *device, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Where the device finds `len` bytes at `iova`; NULL, and a violation, where it may not. */
uint8_t *fake_translate(struct fake_device *device, uint64_t iova, uint64_t len, bool write);

static inline uint16_t get_16(const uint8_t *at) { return (uint16_t)(at[0] | at[1] << 8); }
static inline uint32_t get_32(const uint8_t *at) { return get_16(at) | (uint32_t)get_16(at + 2) << 16; }
static inline uint64_t get_64(const uint8_t *at) { return get_32(at) | (uint64_t)get_32(at + 4) << 32; }

/* Words that the driver reads or writes at the same time. */
static inline uint16_t shared_load_16(const uint8_t *at) { return __atomic_load_n((const uint16_t *)at, __ATOMIC_ACQUIRE); }
static inline void shared_store_16(uint8_t *at, uint16_t value) { __atomic_store_n((uint16_t *)at, value, __ATOMIC_RELEASE); }
static inline void shared_store_32(uint8_t *at, uint32_t value) { __atomic_store_n((uint32_t *)at, value, __ATOMIC_RELAXED); }
static inline void full_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

enum {
    DESCRIPTOR_BYTES = 16,
    DESCRIPTOR_LEN = 8,
    FLAG_NEXT = 1,
    FLAG_WRITE = 2,
    FLAG_INDIRECT = 4,
};

/* Adds a segment to a chain. False: a violation. */
bool fake_add_segment(struct fake_device *device, struct fake_chain *chain, const uint8_t *descriptor, uint16_t flags, uint16_t number);
/* The table of descriptors that this one points to, and how many they are. NULL: a violation. */
const uint8_t *fake_table(struct fake_device *device, const struct fake_queue *queue, const uint8_t *descriptor, uint16_t flags,
                          uint32_t *count);

/* What both formats do, each in its way. A position counts as fake_queue.used_index does. */
struct fake_ring {
    void (*start_at)(struct fake_queue *queue, uint16_t index);
    uint64_t (*driver_bytes)(uint16_t size);
    uint64_t (*device_bytes)(uint16_t size);
    uint16_t (*available)(const struct fake_queue *queue);
    void (*skip)(struct fake_queue *queue);
    bool (*pop)(struct fake_device *device, struct fake_queue *queue, struct fake_chain *chain);
    void (*let_go)(struct fake_queue *queue, const struct fake_chain *chain);
    /* An element for `chains` chains of so many descriptors together. */
    void (*push)(struct fake_queue *queue, uint32_t id, uint32_t len, uint16_t chains, uint16_t descriptors);
    void (*publish)(struct fake_queue *queue);
    void (*unpush)(struct fake_queue *queue);
    bool (*wants_interrupt)(struct fake_queue *queue);
    void (*want_notifications)(struct fake_queue *queue, bool wanted);
    uint8_t *(*interrupt_word)(struct fake_queue *queue);
    uint8_t *(*notification_word)(struct fake_queue *queue);
};
extern const struct fake_ring fake_split_ring, fake_packed_ring;

#endif
