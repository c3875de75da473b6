/* What the library's two halves share: the handshake makes a session, the rest uses it. */
#ifndef NETBRIDGE_INTERNAL_H
#define NETBRIDGE_INTERNAL_H

#include "core.h"
#include "netbridge.h"

enum { RINGS_FD, RX_FD, TX_FD, CLIENT_DOORBELL_FD, DRIVER_DOORBELL_FD, FDS };
enum message_type { HELLO = 1, WELCOME, READY, LINK, BYE, FILTER, MAC, ANSWER };
enum {
    HEADER_BYTES = 16,
    HELLO_BYTES = 64,
    WELCOME_BYTES = 184,
    READY_BYTES = 16,
    LINK_BYTES = 32,
    BYE_BYTES = 128,
    FILTER_BYTES = 920,
    MAC_BYTES = 32,
    ANSWER_BYTES = 128,
    MOST_MESSAGE_BYTES = 1024,
    BYE_TEXT_BYTES = 104,
    LEAST_FRAME = 14,
};

struct mapping {
    void *address;
    uint64_t size;
};

struct netbridge {
    struct nb_client native;
    struct netbridge_failure failure;
    struct netbridge_facts facts;
    uint16_t session;
    uint32_t rx_limit;
    int control_fd;
    int poll_fd; /* epoll: control socket and driver doorbell */
    int fds[FDS];
    struct mapping mappings[3];
    uint8_t *rx_here; /* one for each buffer: whether it is this client's at the moment */
    uint8_t *tx_here;
    uint64_t asked_offloads;
    uint32_t request; /* number of the last one */
    bool answered;    /* and what became of it */
    uint32_t verdict;
    char answer_text[BYE_TEXT_BYTES + 1];
};

/* A message as it came: fds that nobody takes are closed already. */
struct message {
    enum message_type type;
    uint8_t bytes[MOST_MESSAGE_BYTES];
    int fds[FDS];
    int fd_count;
};

/* The next message: 1, 0 when there is none, or an error that is told in `port->failure`. */
int control_receive(struct netbridge *port, struct message *message);
void control_hello(const struct netbridge *port, const char *name);
void control_ready(const struct netbridge *port);
/* FILTER or MAC: `body` is what follows the request's number, zeroes the rest. */
void control_request(const struct netbridge *port, enum message_type type, const void *body, uint32_t size);
/* Says BYE with this reason and words; the other side may be gone. */
void control_bye(const struct netbridge *port, enum netbridge_reason reason, const char *text);
/* The facts of LINK or WELCOME, from their place in it; whether they are such as a device can have. */
bool read_facts(const uint8_t *at, struct netbridge_facts *facts);
/* Keeps what ANSWER says, if it answers the last request. */
void note_answer(struct netbridge *port, const struct message *answer);
/* An error that a BYE brought. */
int closed_by(struct netbridge *port, const struct message *bye);

bool ends_session(int error);
/* 0 while the session lasts, else what ended it. */
int ended(const struct netbridge *port);
/* Milliseconds on the monotonic clock. */
int64_t now_ms(void);
/* Waits until `fd` is ready for `events` (of poll): whether it was, before `deadline` on that clock. */
bool await(int fd, short events, int64_t deadline);

/* Notes an error and returns it; what is noted first stays. */
__attribute__((format(printf, 4, 5))) int fail(struct netbridge *port, enum netbridge_error error, int reason,
                                               const char *format, ...);
/* The same, and tells the driver. */
__attribute__((format(printf, 3, 4))) int broken(struct netbridge *port, enum netbridge_reason reason,
                                                 const char *format, ...);

/* Checks what WELCOME offers, maps it and fills `port->native`: 0, or an error. */
int take_offer(struct netbridge *port, const struct message *welcome);

#endif
