/* Whatever a device and a client can write, written at random: the core survives, comes back, and its books close.
 *
 * Every world begins honest and gets worse. The sanitizers and the inaccessible pages are the judges of memory, the audit
 * is the judge of ownership.
 */
#include "check.h"
#include "white_box.h"
#include "world.h"

#include <stdlib.h>
#include <string.h>

static uint64_t state;
static uint32_t draw(void)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33);
}
static bool one_in(uint32_t n) { return draw() % n == 0; }

/* Values near the edges come up far more often than chance would have them. */
static uint32_t odd_number(void)
{
    static const uint32_t edges[] = {0, 1, 2, 11, 12, 13, 63, 64, 65, 127, 128, 1984, 1985, 1996, 1997, 2048, 32767, 32768,
                                     65535, 65536, 0x7fffffff, 0x80000000, 0xffffffff};
    return one_in(3) ? draw() : edges[draw() % (sizeof(edges) / sizeof(edges[0]))] + (one_in(4) ? draw() % 3 : 0);
}

/* What the device has scribbled over it cannot make honest use of any more. */
static bool scribbled;

static void device_move(struct world *world)
{
    struct fake_queue *queue = one_in(2) ? &world->device.rx : &world->device.tx;
    struct fake_chain chain;
    switch (scribbled ? 5 + draw() % 3 : draw() % 8) {
    case 0: /* honest frame */
    case 1:
    case 2: {
        uint8_t frame[4000];
        uint32_t len = 14 + draw() % (world->device.merges ? 3900 : 1970);
        memset(frame, (int)draw(), len);
        fake_deliver(&world->device, frame, len);
        break;
    }
    case 3: /* honest completion */
        if (fake_pop(&world->device, &world->device.tx, &chain)) {
            fake_give_back(&world->device.tx, &chain, odd_number());
            fake_publish(&world->device.tx);
        }
        break;
    case 4: /* a buffer given back with whatever header and length */
        if (fake_pop(&world->device, &world->device.rx, &chain)) {
            for (uint32_t i = 0; i < HEADER; i++)
                chain.segment[0].at[i] = one_in(2) ? 0 : (uint8_t)draw();
            chain.segment[0].at[10] = (uint8_t)(draw() % 6);
            fake_give_back(&world->device.rx, &chain, one_in(3) ? odd_number() : HEADER + draw() % 1985);
            fake_publish(&world->device.rx);
        }
        break;
    case 5: /* any element */
        if (one_in(8)) {
            fake_push(queue, odd_number(), odd_number());
            fake_publish(queue);
        }
        break;
    case 6: /* any index, or any flags of any descriptor */
        if (one_in(16) && !world->config.ring.packed) {
            fake_set_used_index(queue, (uint16_t)odd_number());
        } else if (one_in(16)) {
            static const uint16_t flags[] = {0, 0x80, 0x8000, 0x8080};
            uint16_t *at = (uint16_t *)(queue->descriptors + 16 * (draw() % queue->place.size) + 14);
            *at = one_in(4) ? (uint16_t)draw() : flags[draw() % 4];
            scribbled = true;
        }
        break;
    default: /* anything at all in the queue's memory */
        if (one_in(16)) {
            bool receives = queue == &world->device.rx;
            const struct nb_virtqueue_layout *layout = receives ? &world->rx_layout : &world->tx_layout;
            uint8_t *memory = receives ? world->rx_memory.device : world->tx_memory.device;
            uint32_t size = queue->place.size;
            uint32_t part = draw() % 3;
            uint8_t *at = memory + (part == 0 ? layout->desc : part == 1 ? layout->driver : layout->device);
            bool packed = world->config.ring.packed;
            uint32_t bytes = part == 0 ? 16 * size : packed ? 4 : part == 1 ? 4 + 2 * size : 4 + 8 * size;
            for (uint32_t i = 0; i < bytes; i++)
                if (one_in(4))
                    at[i] = (uint8_t)draw();
            scribbled = true;
        }
    }
}

static void client_lie(struct world *world)
{
    static const uint16_t kinds[] = {NB_RX_PACKET, NB_TX_PACKET, NB_TX_PACKET_ACK, 0, 77};
    enum world_ring ring = one_in(2) ? RX_FREE : TX_ACTIVE;
    uint32_t *put = ring == RX_FREE ? &world->client.rx_free_put : &world->client.tx_active_put;
    struct nb_entry entry = {
        .dma_handle = forge_handle((uint16_t)(SESSION + one_in(8)), (uint16_t)(draw() % 5), (uint8_t)(1 + draw() % 2),
                                   one_in(4) ? odd_number() & 0xffffff : draw() % 70),
        .len = odd_number(),
        .kind = one_in(4) ? kinds[draw() % 5] : ring == RX_FREE ? NB_RX_PACKET : NB_TX_PACKET,
        .flags = (uint8_t)(one_in(6) ? draw() : 0),
        .queue = (uint8_t)(one_in(10) ? draw() : 0),
    };
    forge_entry(world, ring, (*put)++, entry);
    forge_produced(world, ring, one_in(10) ? odd_number() : *put);
}

static void client_move(struct world *world, struct nb_piece *held, uint32_t *count)
{
    struct nb_piece piece;
    switch (draw() % 7) {
    case 0:
    case 1: {
        int received = nb_client_receive(&world->client, held + *count, 128 - *count);
        CHECK(received >= 0);
        *count += (uint32_t)received;
        break;
    }
    case 2:
    case 3:
        if (*count) {
            uint32_t pick = draw() % *count;
            nb_client_release(&world->client, &held[pick], 1);
            held[pick] = held[--*count];
        }
        break;
    case 4:
        if (nb_client_allocate(&world->client, &piece, 1) == 1) {
            piece.len = one_in(20) ? odd_number() : SHORTEST + draw() % (ROOM - SHORTEST + 1);
            piece.flags = 0;
            nb_client_send(&world->client, &piece, 1);
        }
        break;
    case 5:
        if (*count) {
            uint32_t pick = draw() % *count;
            if (one_in(20))
                held[pick].len = odd_number();
            nb_client_forward(&world->client, &held[pick], 1); /* a piece of a longer frame it may not */
            held[pick] = held[--*count];
        }
        break;
    default:
        if (one_in(12))
            client_lie(world);
    }
}

static void live_and_lie(uint64_t seed)
{
    struct world world;
    struct nb_piece held[128];
    uint32_t count = 0;
    scribbled = false;
    state = seed * 0x9e3779b97f4a7c15ull + 1;
    bool packed = one_in(2);
    world_open(&world, (struct world_config){
                           .ring = {packed, one_in(2), one_in(2), one_in(3), one_in(4)},
                           .rx_size = (uint16_t)(packed ? 1 + draw() % 70 : 1u << draw() % 7),
                           .tx_size = (uint16_t)(packed ? 2 + draw() % 70 : 2u << draw() % 6),
                           .rx_count = 1 + draw() % 64,
                           .tx_count = 1 + draw() % 64,
                           .max_pieces = one_in(2) ? 1 : 1 + draw() % 64,
                           .client_limit = 1 + draw() % 64,
                           .burst = 1 + draw() % 64,
                           .tx_copied = one_in(2) ? 0 : NB_TX_MOST_COPIED,
                           .ring_position = one_in(2) ? 0 : -(draw() % 64),
                           .queue_index = (uint16_t)(one_in(2) ? 0 : -(draw() % 64)),
                       });
    for (int move = 0; move < 200; move++) {
        if (one_in(2))
            device_move(&world);
        else
            client_move(&world, held, &count);
        if (one_in(3)) {
            struct nb_pump_result result = world_pump(&world);
            const char *wrong = white_box_audit(world.pump);
            if (wrong)
                FAIL("seed %llu, move %d: %s", (unsigned long long)seed, move, wrong);
            if (result.event != NB_EVENT_CONTROL)
                break; /* the session is over, as it should be */
        }
    }
    world.device.violation[0] = 0; /* a lying device finds things that it has upset itself */
    world_close(&world);
}

TEST(random_lies_of_device_and_client)
{
    const char *only = getenv("CORE_SEED");
    if (only)
        live_and_lie(strtoull(only, NULL, 10));
    else
        for (uint64_t seed = 0; seed < 1000ull * check_times(); seed++)
            live_and_lie(seed);
}
