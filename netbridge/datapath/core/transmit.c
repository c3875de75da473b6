/* Transmit: client to device. What becomes of the buffers when the device is done with them is complete.c's business.
 *
 * A frame's pieces are gathered until the last of them is there, each checked as it comes; until then they wait for nobody.
 * A frame that is whole goes to its queue, or waits behind its queue's backlog. Most frames are one piece without a header,
 * and go straight through; the short ones among them as a copy (tx_slot.h).
 *
 * A frame may also be forwarded: the client sends it from the RX buffer that it came in. That buffer is free at once if
 * the frame is copied, else when the device is done with it.
 */
#include "pump.h"

#include <string.h>

#include "counting.h"

enum { FETCHED_AHEAD = 8 }; /* entries */

/* ---- To the device -------------------------------------------------------------------------------------------- */

static uint64_t header_iova(const struct nb_pump *pump, uint32_t first)
{
    uint32_t slot = pump->tx_pieces[first].has_header ? 1 + first : 0;
    return pump->config.tx_slots_iova + tx_slot_offset(slot);
}

static bool has_room_for(const struct pump_pair *pair, uint32_t pieces)
{
    return virtqueue_has_room(pair->tx_queue, 1 + pieces);
}

/* Where the device reads the frame in a buffer that was sent. */
static uint64_t frame_iova(const struct nb_pump *pump, uint32_t number)
{
    const struct nb_ledger *ledger = pump->config.tx_ledger;
    if (number >= ledger->region.count) {
        number -= ledger->region.count;
        ledger = pump->config.rx_ledger;
    }
    return ledger_iova(ledger, number) + ledger->region.headroom;
}

static void add_frame(struct nb_pump *pump, struct pump_pair *pair, uint32_t first)
{
    struct nb_segment segments[1 + NB_MOST_PIECES];
    uint32_t count = 0;
    segments[count++] = (struct nb_segment){header_iova(pump, first), pump->config.net_header_bytes};
    for (uint32_t buffer = first; buffer != NO_BUFFER; buffer = pump->tx_pieces[buffer].next)
        segments[count++] = (struct nb_segment){frame_iova(pump, buffer), pump->tx_pieces[buffer].bytes};
    virtqueue_add(pair->tx_queue, segments, count, 0, count > 2 ? first | (uint32_t)HAS_MORE_PIECES : first);
}

static uint32_t drain_backlog(struct nb_pump *pump, struct pump_pair *pair)
{
    uint32_t sent = 0;
    while (pair->backlog_first != NO_BUFFER) {
        uint32_t first = pair->backlog_first;
        if (!has_room_for(pair, pump->tx_pieces[first].pieces))
            break;
        pair->backlog_first = pump->tx_pieces[first].following;
        add_frame(pump, pair, first);
        sent++;
    }
    return sent;
}

static void put_in_backlog(struct nb_pump *pump, struct pump_pair *pair, uint32_t first)
{
    pump->tx_pieces[first].following = NO_BUFFER;
    if (pair->backlog_first == NO_BUFFER)
        pair->backlog_first = first;
    else
        pump->tx_pieces[pair->backlog_last].following = first;
    pair->backlog_last = first;
}

bool pump_can_transmit(const struct nb_pump *pump)
{
    for (uint32_t i = 0; i < pump->config.pair_count; i++)
        if (pump->pairs[i].backlog_first == NO_BUFFER && has_room_for(&pump->pairs[i], 1))
            return true;
    return false;
}

/* ---- From the client ------------------------------------------------------------------------------------------ */

/* What is wrong with an entry by itself: 0, or a verdict. `known`: flags that it may have; `most`: bytes. */
static int check_entry(const struct nb_pump *pump, const struct nb_entry *entry, int64_t buffer, uint8_t known,
                       uint32_t most)
{
    if (entry->kind != NB_TX_PACKET || entry->flags & ~known)
        return client_fault(NB_REFUSE_KIND);
    if (buffer < 0)
        return client_fault((int)(-1 - buffer));
    if (entry->queue >= pump->config.pair_count)
        return client_fault(NB_REFUSE_QUEUE);
    if (entry->len == 0 || entry->len > most)
        return client_fault(NB_REFUSE_LENGTH);
    return 0;
}

/* Copied once, here; checked when the frame is whole. */
static void take_header(struct nb_pump *pump, uint32_t first)
{
    const struct nb_ledger *ledger = pump->config.tx_ledger;
    const uint8_t *from = ledger_address(ledger, first) + ledger->region.headroom - NB_NET_HEADER_BYTES;
    uint8_t *to = (uint8_t *)tx_header_of(pump, first);
    for (uint32_t at = 0; at < NB_NET_HEADER_BYTES; at += sizeof(uint32_t)) {
        uint32_t word = load_once_32((const uint32_t *)(const void *)(from + at));
        memcpy(to + at, &word, sizeof(word));
    }
}

static int begin_frame(struct nb_pump *pump, const struct nb_entry *entry, uint32_t buffer)
{
    if (pump->gathered.pieces != 0)
        return client_fault(NB_REFUSE_PIECES);
    pump->gathered = (struct tx_frame){
        .first = buffer,
        .last = buffer,
        .pieces = 1,
        .bytes = entry->len,
        .queue = entry->queue,
        .has_header = entry->flags & NB_HEADER,
    };
    if (pump->gathered.has_header)
        take_header(pump, buffer);
    return 0;
}

static int continue_frame(struct nb_pump *pump, const struct nb_entry *entry, uint32_t buffer)
{
    struct tx_frame *frame = &pump->gathered;
    if (frame->pieces == 0 || frame->pieces == pump->config.tx_max_pieces)
        return client_fault(NB_REFUSE_PIECES);
    if (entry->queue != frame->queue)
        return client_fault(NB_REFUSE_QUEUE);
    if (entry->flags & NB_HEADER)
        return client_fault(NB_REFUSE_KIND);
    pump->tx_pieces[frame->last].next = buffer;
    frame->last = buffer;
    frame->pieces++;
    frame->bytes += entry->len;
    return 0;
}

/* A forwarded frame's buffer is the device's; it does not count as given back before the device is done with it. */
static inline void book_forwarded(struct nb_pump *pump, uint32_t buffer)
{
    ledger_move(pump->config.rx_ledger, buffer, NB_OWNER_CLIENT, NB_OWNER_DEVICE);
    pump->rx_may_hold--;
    pump_note_return(pump);
}

/* Adds an entry to the frame that is being gathered: 0, or a verdict. A buffer that was taken is booked as the device's,
 * also while it waits, and also if the session ends now. */
static int gather_entry(struct nb_pump *pump, const struct nb_entry *entry)
{
    int64_t checked = ledger_check(pump->config.tx_ledger, entry->dma_handle);
    uint8_t known = NB_MORE | NB_CONTINUATION | (pump->tx_has_offloads ? NB_HEADER : 0);
    int verdict = check_entry(pump, entry, checked, known, ledger_room(pump->config.tx_ledger));
    if (verdict < 0)
        return verdict;
    uint32_t buffer = (uint32_t)checked;
    bool begins = !(entry->flags & NB_CONTINUATION), ends = !(entry->flags & NB_MORE);
    uint32_t before = begins ? 0 : pump->gathered.bytes;
    if (entry->len > pump->config.tx_largest_frame - before || (ends && before + entry->len < ETHERNET_HEADER))
        return client_fault(NB_REFUSE_LENGTH);
    verdict = begins ? begin_frame(pump, entry, buffer) : continue_frame(pump, entry, buffer);
    if (verdict < 0)
        return verdict;
    pump->tx_pieces[buffer].bytes = entry->len;
    ledger_move(pump->config.tx_ledger, buffer, NB_OWNER_CLIENT, NB_OWNER_DEVICE);
    return 0;
}

/* A frame is whole. */
static void send_whole(struct nb_pump *pump, struct pump_pair *pair, uint32_t first)
{
    if (pair->backlog_first == NO_BUFFER && has_room_for(pair, pump->tx_pieces[first].pieces))
        add_frame(pump, pair, first);
    else
        put_in_backlog(pump, pair, first);
}

/* The last piece is there: the frame goes to its queue. 0, or a verdict. */
static int finish_sent(struct nb_pump *pump)
{
    struct tx_frame *frame = &pump->gathered;
    uint32_t first = frame->first;
    if (frame->has_header && !net_header_check(tx_header_of(pump, first), frame->bytes, pump->config.offloads))
        return client_fault(NB_REFUSE_HEADER);
    struct tx_piece *piece = &pump->tx_pieces[first];
    piece->pieces = (uint16_t)frame->pieces;
    piece->has_header = frame->has_header;
    frame->pieces = 0;
    send_whole(pump, &pump->pairs[frame->queue], first);
    return 0;
}

/* A received frame that is sent from where it is. 0, or a verdict. */
static int forward(struct nb_pump *pump, const struct nb_entry *entry)
{
    int64_t checked = ledger_check(pump->config.rx_ledger, entry->dma_handle);
    int verdict = check_entry(pump, entry, checked, 0, pump->longest_forwarded);
    if (verdict < 0)
        return verdict;
    if (pump->gathered.pieces != 0)
        return client_fault(NB_REFUSE_PIECES);
    if (entry->len < ETHERNET_HEADER)
        return client_fault(NB_REFUSE_LENGTH);
    book_forwarded(pump, (uint32_t)checked);
    uint32_t number = number_of_forwarded(pump, (uint32_t)checked);
    pump->tx_pieces[number] = (struct tx_piece){.next = NO_BUFFER, .bytes = entry->len, .pieces = 1};
    send_whole(pump, &pump->pairs[entry->queue], number);
    return 0;
}

/* ---- The rule, not the exception ------------------------------------------------------------------------------ */

/* Where a frame goes of one piece and without a header, `buffer` of the ledger's region, if nothing is wrong with it,
 * and nothing in its way. NULL: the longer way, which also finds out what is wrong. */
static inline struct pump_pair *straight_way(struct nb_pump *pump, const struct nb_entry *entry, int64_t buffer,
                                             uint32_t most)
{
    if (buffer < 0 || entry->kind != NB_TX_PACKET || entry->flags != 0 || entry->queue >= pump->config.pair_count ||
        entry->len < ETHERNET_HEADER || entry->len > most || pump->gathered.pieces != 0)
        return NULL;
    struct pump_pair *pair = &pump->pairs[entry->queue];
    return pair->backlog_first == NO_BUFFER && has_room_for(pair, 1) ? pair : NULL;
}

/* A copy in this slot. */
static inline void add_copy(const struct nb_pump *pump, struct pump_pair *pair, uint32_t number, const uint8_t *frame,
                            uint32_t len, uint32_t token)
{
    const struct nb_pump_config *config = &pump->config;
    uint64_t slot = tx_slot_offset(number);
    tx_slot_copy(config->tx_slots + slot, frame, len);
    struct nb_segment segment = tx_slot_segment(config->tx_slots_iova + slot, config->net_header_bytes, len);
    virtqueue_add(pair->tx_queue, &segment, 1, 0, token);
}

static inline void add_in_place(const struct nb_pump *pump, struct pump_pair *pair, const struct nb_ledger *ledger,
                                uint32_t buffer, uint32_t len, uint32_t token)
{
    const struct nb_pump_config *config = &pump->config;
    if (config->tx_header_with_frame) {
        uint32_t before_frame = ledger->region.headroom - NB_NET_HEADER_BYTES;
        tx_header_clear(ledger_address(ledger, buffer) + before_frame);
        struct nb_segment segment = {ledger_iova(ledger, buffer) + before_frame, NB_NET_HEADER_BYTES + len};
        virtqueue_add(pair->tx_queue, &segment, 1, 0, token);
        return;
    }
    const struct nb_segment segments[2] = {{config->tx_slots_iova, config->net_header_bytes},
                                           {ledger_iova(ledger, buffer) + ledger->region.headroom, len}};
    virtqueue_add(pair->tx_queue, segments, 2, 0, token);
}

static inline bool send_simple(struct nb_pump *pump, struct nb_entry entry)
{
    struct nb_ledger *ledger = pump->config.tx_ledger;
    int64_t checked = ledger_check(ledger, entry.dma_handle);
    struct pump_pair *pair = straight_way(pump, &entry, checked, ledger_room(ledger));
    if (!pair)
        return false;
    uint32_t buffer = (uint32_t)checked;
    ledger_move(ledger, buffer, NB_OWNER_CLIENT, NB_OWNER_DEVICE);
    if (entry.len <= pump->config.tx_copied)
        add_copy(pump, pair, 1 + buffer, ledger_address(ledger, buffer) + ledger->region.headroom, entry.len, buffer);
    else
        add_in_place(pump, pair, ledger, buffer, entry.len, buffer);
    return true;
}

static inline bool forward_simple(struct nb_pump *pump, struct nb_entry entry)
{
    struct nb_ledger *ledger = pump->config.rx_ledger;
    int64_t checked = ledger_check(ledger, entry.dma_handle);
    struct pump_pair *pair = straight_way(pump, &entry, checked, pump->longest_forwarded);
    if (!pair)
        return false;
    uint32_t buffer = (uint32_t)checked;
    if (entry.len <= pump->config.tx_copied) {
        add_copy(pump, pair, pair->first_slot + virtqueue_next_slot(pair->tx_queue),
                 ledger_address(ledger, buffer) + ledger->region.headroom, entry.len, NO_BUFFER);
        ledger_put_free(ledger, buffer);
        pump_note_return(pump);
        return true;
    }
    book_forwarded(pump, buffer);
    add_in_place(pump, pair, ledger, buffer, entry.len, number_of_forwarded(pump, buffer));
    return true;
}

static inline bool is_forwarded(uint64_t handle) { return handle_region(handle) == NB_REGION_RX; }

/* Asks for the frame that an entry a little further on names, if it is to be copied: its client wrote it just now. A wrong
 * handle does no harm; it is looked at when its turn comes. */
static inline void fetch_ahead(const struct nb_pump *pump, uint32_t position)
{
    const struct nb_entry *entry = ring_slot(&pump->config.tx_active, position + FETCHED_AHEAD);
    uint64_t handle = load_once_64(&entry->dma_handle);
    const struct nb_ledger *ledger = is_forwarded(handle) ? pump->config.rx_ledger : pump->config.tx_ledger;
    uint32_t index = handle_index(handle);
    if (index < ledger->region.count)
        __builtin_prefetch(ledger_address(ledger, index) + ledger->region.headroom);
}

/* The longer way, with a copy of its own of the entry at `position`: nothing was decided by the first. How many frames are
 * whole by it, or a verdict. */
static int send_by_the_piece(struct nb_pump *pump, uint32_t position)
{
    struct nb_entry entry = ring_take(&pump->config.tx_active, &position);
    bool forwards = is_forwarded(entry.dma_handle);
    int verdict = forwards ? forward(pump, &entry) : gather_entry(pump, &entry);
    if (verdict < 0 || entry.flags & NB_MORE)
        return verdict;
    verdict = forwards ? 0 : finish_sent(pump);
    return verdict < 0 ? verdict : 1;
}

int pump_transmit(struct nb_pump *pump)
{
    int64_t waiting = ring_waiting(&pump->config.tx_active, pump->tx_active_taken);
    if (waiting < 0)
        return client_fault(NB_REFUSE_RING_JUMP);
    uint32_t moved = 0;
    for (uint32_t i = 0; i < pump->config.pair_count; i++)
        moved += drain_backlog(pump, &pump->pairs[i]);
    const struct nb_ring_place ring = pump->config.tx_active;
    uint32_t position = pump->tx_active_taken;
    uint32_t frames = moved, taken = 0;
    int verdict = 0;
    bool copies = pump->config.tx_copied != 0;
    while (taken < waiting && taken < pump->config.burst) {
        uint32_t next = position;
        if (copies && taken + FETCHED_AHEAD < waiting)
            fetch_ahead(pump, position);
        struct nb_entry entry = ring_take(&ring, &next);
        if (is_forwarded(entry.dma_handle) ? forward_simple(pump, entry) : send_simple(pump, entry))
            frames++;
        else if (!pump_can_transmit(pump))
            break;
        else if ((verdict = send_by_the_piece(pump, position)) > 0)
            frames++;
        position = next;
        taken++;
        if (verdict < 0)
            break;
    }
    if (taken) {
        pump->tx_active_taken = position;
        ring_consumed(&ring, position);
    }
    if (frames) {
        count_burst(pump->config.counters->tx_bursts, frames);
        for (uint32_t i = 0; i < pump->config.pair_count; i++)
            pump_notify(pump, pump->pairs[i].tx_queue);
    }
    return verdict < 0 ? verdict : (int)(moved + taken);
}
