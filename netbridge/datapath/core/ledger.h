/* The ledger: of every buffer of a region, who owns it now and under which lease.
 *
 * It lives in the driver's private memory. A client holds a DMA handle, a number that names session, lease, region and
 * index; it is worth something only while the ledger says that this very lease is the client's. Each time a buffer goes
 * to the client the lease changes, so a handle kept too long, repeated or made up is found out.
 */
#ifndef NB_LEDGER_H
#define NB_LEDGER_H

#include <stdint.h>

#include "core.h"

struct nb_buffer {
    uint16_t lease;
    uint8_t owner; /* enum nb_owner */
};

struct nb_ledger {
    struct nb_region region;
    uint64_t handle_stem; /* what all its handles have in common */
    uint32_t owned[NB_OWNERS];
    uint32_t *free; /* stack of the driver's buffers; the warmest on top */
    struct nb_buffer buffers[];
};

static inline uint64_t ledger_handle(const struct nb_ledger *ledger, uint32_t index, uint16_t lease)
{
    return ledger->handle_stem | (uint64_t)lease << 32 | index;
}

static inline uint32_t handle_index(uint64_t handle) { return (uint32_t)handle & 0xffffff; }
static inline uint8_t handle_region(uint64_t handle) { return (uint8_t)(handle >> 24); }

static inline uint8_t *ledger_address(const struct nb_ledger *ledger, uint32_t index)
{
    return ledger->region.base + (uint64_t)index * ledger->region.stride;
}

static inline uint64_t ledger_iova(const struct nb_ledger *ledger, uint32_t index)
{
    return ledger->region.iova + (uint64_t)index * ledger->region.stride;
}

/* Bytes of frame that fit a buffer. */
static inline uint32_t ledger_room(const struct nb_ledger *ledger)
{
    return ledger->region.stride - ledger->region.headroom;
}

static inline uint32_t ledger_free_count(const struct nb_ledger *ledger) { return ledger->owned[NB_OWNER_DRIVER]; }

static inline void ledger_move(struct nb_ledger *ledger, uint32_t index, enum nb_owner from, enum nb_owner to)
{
    ledger->buffers[index].owner = (uint8_t)to;
    ledger->owned[from]--;
    ledger->owned[to]++;
}

/* A free buffer for the device. Only while ledger_free_count() is not 0. */
static inline uint32_t ledger_take_for_device(struct nb_ledger *ledger)
{
    uint32_t index = ledger->free[ledger->owned[NB_OWNER_DRIVER] - 1];
    ledger_move(ledger, index, NB_OWNER_DRIVER, NB_OWNER_DEVICE);
    return index;
}

/* Back to the free ones, from the device or the client. */
static inline void ledger_put_free(struct nb_ledger *ledger, uint32_t index)
{
    enum nb_owner from = (enum nb_owner)ledger->buffers[index].owner;
    ledger->free[ledger->owned[NB_OWNER_DRIVER]] = index;
    ledger_move(ledger, index, from, NB_OWNER_DRIVER);
}

/* From the device to the client, under a new lease; returns the handle. */
static inline uint64_t ledger_lend(struct nb_ledger *ledger, uint32_t index)
{
    struct nb_buffer *buffer = &ledger->buffers[index];
    ledger_move(ledger, index, (enum nb_owner)buffer->owner, NB_OWNER_CLIENT);
    return ledger_handle(ledger, index, ++buffer->lease);
}

/* Why a handle is refused that is not the one the client holds. */
static inline enum nb_refusal ledger_refusal(const struct nb_ledger *ledger, uint64_t handle)
{
    if (handle_region(handle) != ledger->region.id)
        return NB_REFUSE_REGION;
    if (handle_index(handle) >= ledger->region.count)
        return NB_REFUSE_INDEX;
    if ((uint16_t)(handle >> 48) != ledger->region.session)
        return NB_REFUSE_SESSION;
    if ((uint16_t)(handle >> 32) != ledger->buffers[handle_index(handle)].lease)
        return NB_REFUSE_LEASE;
    return NB_REFUSE_OWNER;
}

/* Checks a handle that the client presents: the index of its buffer, or minus one minus the enum nb_refusal. */
static inline int64_t ledger_check(const struct nb_ledger *ledger, uint64_t handle)
{
    uint32_t index = handle_index(handle);
    /* One comparison for everything that a handle says. */
    if (index < ledger->region.count && handle == ledger_handle(ledger, index, ledger->buffers[index].lease) &&
        ledger->buffers[index].owner == NB_OWNER_CLIENT)
        return index;
    return -1 - (int64_t)ledger_refusal(ledger, handle);
}

#endif
