/* The device at work in a thread: it delivers numbered frames and takes them back, reflected, in order and byte for byte.
 *
 * Between bursts of work it goes to sleep as far as the protocol is concerned: it asks for a notification, looks once
 * more, and then does nothing until the driver has written one. So a notification or an interrupt that is lost leaves
 * everybody asleep, and the case fails with a picture of who waits for what.
 */
#ifndef TRAFFIC_H
#define TRAFFIC_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "world.h"

/* Zero members mean the default in brackets. */
struct traffic_config {
    uint64_t frames;
    uint32_t window;        /* most frames on their way [1] */
    uint32_t burst;         /* frames delivered before interrupting [1] */
    uint32_t fixed_length;  /* [frame_length()] */
    bool scrambled;         /* sent frames are completed out of order */
    bool delays;            /* random pauses between any two moves */
    bool lossy;             /* frames may be missing from what comes back, as `client_limit` has it */
    bool unchecked;         /* contents are neither made nor compared: for measuring */
    enum fake_lie lie;      /* told about frame `lie_at` [none] */
    uint64_t lie_at;
};

struct traffic {
    struct traffic_config config;
    struct world *world;
    pthread_t thread;
    uint64_t delivered;
    uint64_t returned;
    uint64_t next_expected;
    uint32_t random;
    bool abandoned;
};

void traffic_start(struct traffic *traffic, struct world *world, struct traffic_config config);
/* Waits until every frame came back (or the lie was told). */
void traffic_finish(struct traffic *traffic);

/* Stops although frames are missing, and waits until it has. */
void traffic_abandon(struct traffic *traffic);

/* nb_client_echo in a thread. */
struct echo {
    struct world *world;
    pthread_t thread;
    struct nb_echo_counts counts;
    int verdict;
};
void echo_start(struct echo *echo, struct world *world);
void echo_stop(struct echo *echo);

/* Pump, echo and traffic in three threads until all is done, then the whole account: frames delivered = packets_rx =
 * frames echoed = packets_tx = frames returned, bytes alike, none dropped, no buffer missing. */
void traffic_echo(struct world *world, struct traffic_config config);

#endif
