/* The control queue: one command at a time, and its answer (virtio 1.3 §5.1.6.5). It goes through the same virtqueue, with
 * the same checks, as frames do; what a command means, and how long to wait for its answer, is Python's business.
 */
#include "virtqueue.h"

int nb_control_submit(struct nb_virtqueue *queue, uint64_t command_iova, uint32_t command_bytes, uint64_t answer_iova,
                      uint32_t answer_bytes)
{
    const struct nb_segment chain[] = {{.iova = command_iova, .len = command_bytes},
                                       {.iova = answer_iova, .len = answer_bytes}};
    if (virtqueue_in_flight(queue) != 0 || !virtqueue_has_room(queue, 2))
        return -1;
    /* Off and on again: where the device is told at which index to interrupt, it is the next one. */
    virtqueue_set_interrupts(queue, false);
    virtqueue_set_interrupts(queue, true);
    virtqueue_add(queue, chain, 1, 1, 0);
    if (virtqueue_publish(queue))
        virtqueue_notify(queue);
    return 0;
}

int nb_control_poll(struct nb_virtqueue *queue, uint32_t *written)
{
    struct nb_used used;
    int completed = virtqueue_completed(queue);
    int taken = completed > 0 ? virtqueue_take(queue, &used) : completed;
    if (taken > 0)
        *written = used.written;
    return taken;
}
