/* Everything a device can write, as a fuzzer has it: used rings and packed descriptors, headers, lengths, and honest moves in
 * between, read from a string of bytes. libFuzzer makes the strings (fuzz.py), fuzz_replay.c repeats those that were kept.
 *
 * Whatever they are: no access outside (AddressSanitizer, inaccessible pages), every buffer is owned exactly once (the
 * audit), and the pump comes back.
 */
#include "check.h"
#include "white_box.h"
#include "world.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
    const uint8_t *at;
    const uint8_t *end;
};

static uint8_t next(struct input *input) { return input->at < input->end ? *input->at++ : 0; }
static uint16_t next_16(struct input *input)
{
    uint16_t low = next(input);
    return (uint16_t)(low | next(input) << 8);
}

/* Small, or anything. */
static uint32_t number(struct input *input)
{
    uint8_t kind = next(input);
    uint32_t low = kind < 0xf0 ? kind : next_16(input);
    return kind < 0xf8 ? low : low | (uint32_t)next_16(input) << 16;
}

static uint32_t length(struct input *input)
{
    uint8_t kind = next(input);
    if (kind >= 0xc0)
        return number(input);
    uint32_t frame = kind < 0x80 ? kind : ROOM - 32u + (kind & 0x3f);
    return HEADER + frame;
}

/* Through what the device has written over, it reaches where it may not: it then makes no honest use of its rings. */
static bool scribbled;

static void write_ring(struct world *world, struct input *input)
{
    uint8_t which = next(input);
    bool receives = which & 1, packed = world->config.ring.packed;
    const struct nb_virtqueue_layout *layout = receives ? &world->rx_layout : &world->tx_layout;
    uint8_t *memory = receives ? world->rx_memory.device : world->tx_memory.device;
    uint32_t entries = receives ? world->config.rx_size : world->config.tx_size;
    uint32_t part = which >> 1 & 3, bytes;
    uint64_t start;
    if (part <= 1) {
        start = part && !packed ? layout->device : layout->desc;
        bytes = part && !packed ? 6 + 8 * entries : 16 * entries;
    } else {
        start = part == 2 ? layout->device : layout->driver;
        bytes = packed ? 4 : part == 2 ? 6 + 8 * entries : 6 + 2 * entries;
    }
    scribbled |= start != layout->device;
    uint32_t offset = next_16(input) % bytes, count = 1 + next(input) % 16;
    for (uint32_t i = 0; i < count && offset + i < bytes; i++)
        memory[start + offset + i] = next(input);
}

static void complete_receive(struct world *world, struct input *input)
{
    struct fake_chain chain;
    if (scribbled || !fake_pop(&world->device, &world->device.rx, &chain) || !chain.segment[0].writable)
        return;
    for (uint32_t i = 0; i < HEADER && i < chain.segment[0].len; i++)
        chain.segment[0].at[i] = next(input);
    fake_give_back(&world->device.rx, &chain, length(input));
}

static void serve_client(struct world *world, struct input *input)
{
    struct nb_piece pieces[64];
    int received = nb_client_receive(&world->client, pieces, 64);
    CHECK(received >= 0);
    for (int i = 0; i < received; i++) /* every byte that it was given is there */
        for (uint32_t at = 0; at < pieces[i].len; at += 64)
            (void)*(volatile uint8_t *)(pieces[i].data + at);
    if (next(input) & 1)
        nb_client_release(&world->client, pieces, (uint32_t)received);
    if (nb_client_allocate(&world->client, pieces, 1) == 1) {
        pieces[0].len = SHORTEST + next(input);
        pieces[0].flags = 0;
        nb_client_send(&world->client, pieces, 1);
    }
}

/* False: the session is over. */
static bool move(struct world *world, struct input *input)
{
    struct fake_device *device = &world->device;
    struct fake_chain chain;
    uint8_t frame[4000] = {0};
    uint8_t choice = next(input);
    struct fake_queue *queue = choice & 0x80 ? &device->rx : &device->tx;
    switch (choice % 8) {
    case 0:
        if (!scribbled)
            fake_deliver(device, frame, SHORTEST + next_16(input) % (device->merges ? 3900 : ROOM - SHORTEST));
        return true;
    case 1:
        if (!scribbled && fake_pop(device, &device->tx, &chain))
            fake_give_back(&device->tx, &chain, number(input));
        return true;
    case 2:
        complete_receive(world, input);
        return true;
    case 3: {
        uint32_t id = number(input);
        fake_push(queue, id, length(input));
        return true;
    }
    case 4:
        fake_publish(queue);
        return true;
    case 5:
        write_ring(world, input);
        return true;
    case 6:
        serve_client(world, input);
        return true;
    default:
        fake_publish(&device->rx);
        fake_publish(&device->tx);
        return world_pump(world).event == NB_EVENT_CONTROL;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    struct world world;
    uint8_t features = next(&input), shape = next(&input);
    bool packed = features & 1;
    scribbled = false;
    world_open(&world, (struct world_config){
                           .ring = {packed, features & 2, features & 4, features & 8, false},
                           .max_pieces = features & 16 ? 4 : 1,
                           .rx_size = (uint16_t)(packed ? 1u + shape % 13 : 1u << shape % 4),
                           .tx_size = (uint16_t)(packed ? 2u + shape / 16 : 2u << (shape >> 4) % 3),
                           .rx_count = 24,
                           .tx_count = 12,
                           .burst = features & 32 ? 3 : 64,
                           .queue_index = features & 64 ? 0xfffe : 0,
                       });
    bool more = true;
    while (more && input.at < input.end) {
        more = move(&world, &input);
        world_check_books(&world);
    }
    world_discard(&world);
    return 0;
}
