/* The driver's own memory for one sent frame: its virtio header, and the frame itself if it is short.
 *
 * A header that a client could reach would have to be believed, so it lies here, in a descriptor of its own in front of the
 * client's buffer. For a short frame a second descriptor costs the device, and so everybody, more than a copy: it is
 * copied behind its header, and is one descriptor. What of it the device sees is then also beyond the client's reach.
 * Where the client is trusted with the header of a longer frame (tx_header_with_frame), it is zeroed in front of the frame.
 *
 *       0  header of a frame that asked for offloads, checked
 *      52  zeroes: header of the copied frame, never written
 *      64  the copied frame: on cache lines of its own, so that the header's stay where they are
 */
#ifndef NB_TX_SLOT_H
#define NB_TX_SLOT_H

#include <stdint.h>
#include <string.h>

#include "ring.h"

enum { TX_SLOT_FRAME = 64, TX_SLOT_COPIED_AT_ONCE = 64 };

/* `number` 0: the slot of zeroes. */
static inline uint64_t tx_slot_offset(uint32_t number) { return (uint64_t)number * NB_TX_SLOT_BYTES; }

/* Copies a frame of up to NB_TX_MOST_COPIED bytes. There must be as many to read behind `frame`, whatever `len` is: whole
 * lines are copied, without a loop. */
static inline void tx_slot_copy(uint8_t *slot, const uint8_t *frame, uint32_t len)
{
    uint8_t *to = slot + TX_SLOT_FRAME;
    memcpy(to, frame, TX_SLOT_COPIED_AT_ONCE);
    if (len > TX_SLOT_COPIED_AT_ONCE)
        memcpy(to + TX_SLOT_COPIED_AT_ONCE, frame + TX_SLOT_COPIED_AT_ONCE, TX_SLOT_COPIED_AT_ONCE);
    if (len > 2 * TX_SLOT_COPIED_AT_ONCE)
        memcpy(to + 2 * TX_SLOT_COPIED_AT_ONCE, frame + 2 * TX_SLOT_COPIED_AT_ONCE, TX_SLOT_COPIED_AT_ONCE);
}

/* The header of a frame that asks for nothing, in its buffer right in front of it; aligned to 32 bits. Written only if it is
 * not there yet: whoever had the buffer before keeps the cache line. */
static inline void tx_header_clear(uint8_t *header)
{
    uint32_t *words = (uint32_t *)(void *)header;
    if (load_once_32(&words[0]) | load_once_32(&words[1]) | load_once_32(&words[2]))
        memset(header, 0, NB_NET_HEADER_BYTES);
}

/* Header and frame of a slot that a frame of `len` bytes was copied into. */
static inline struct nb_segment tx_slot_segment(uint64_t slot_iova, uint32_t header_bytes, uint32_t len)
{
    return (struct nb_segment){slot_iova + TX_SLOT_FRAME - header_bytes, header_bytes + len};
}

#endif
