/* The control socket: messages in and out, each checked as docs/port.md has it before anything is believed. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "internal.h"

enum {
    MAGIC = 0x5450424e,
    VERSION = 1,
    MOST_FDS = 16,
    LINK_UP = 1,
    ANNOUNCE = 2,
    LEAST_MTU = 68,
    MOST_MTU = 65535,
};

static const char *const NAMES[] = {"", "HELLO", "WELCOME", "READY", "LINK", "BYE", "FILTER", "MAC", "ANSWER"};
static const uint32_t SIZES[] = {0,          HELLO_BYTES,  WELCOME_BYTES, READY_BYTES, LINK_BYTES,
                                 BYE_BYTES, FILTER_BYTES, MAC_BYTES,     ANSWER_BYTES};
static const char *const REASONS[] = {
    "no reason given",
    "orderly shutdown",
    "another client has the port",
    "not permitted",
    "no common version",
    "malformed message",
    "message out of place",
    "handshake took too long",
    "geometry does not hold",
    "a ring entry that may not be",
    "the device was reset",
    "memory is not shared with clients",
    "internal failure",
};

static uint16_t get_16(const uint8_t *at)
{
    uint16_t value;
    memcpy(&value, at, sizeof(value));
    return le16toh(value);
}

static uint32_t get_32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof(value));
    return le32toh(value);
}

/* ---- Errors */

static bool may_pass(enum netbridge_error error, int reason)
{
    if (error == NETBRIDGE_UNAVAILABLE)
        return true;
    return error == NETBRIDGE_CLOSED &&
           (reason == NETBRIDGE_REASON_UNSPECIFIED || reason == NETBRIDGE_REASON_BUSY ||
            reason == NETBRIDGE_REASON_TIMEOUT || reason == NETBRIDGE_REASON_DEVICE_RESET ||
            reason == NETBRIDGE_REASON_FAILED);
}

static int note(struct netbridge *port, enum netbridge_error error, int reason, const char *format, va_list arguments)
{
    struct netbridge_failure *failure = &port->failure;
    if (ends_session(failure->error))
        return failure->error;
    failure->error = error;
    failure->reason = reason;
    failure->may_pass = may_pass(error, reason);
    vsnprintf(failure->text, sizeof(failure->text), format, arguments);
    /* It may hold what somebody else wrote, and go to a terminal. */
    for (char *at = failure->text; *at; at++)
        if (*at < ' ' || *at > '~')
            *at = '?';
    return error;
}

int fail(struct netbridge *port, enum netbridge_error error, int reason, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int result = note(port, error, reason, format, arguments);
    va_end(arguments);
    return result;
}

int broken(struct netbridge *port, enum netbridge_reason reason, const char *format, ...)
{
    enum netbridge_error error = reason == NETBRIDGE_REASON_GEOMETRY ? NETBRIDGE_GEOMETRY : NETBRIDGE_BROKEN;
    va_list arguments;
    va_start(arguments, format);
    int result = note(port, error, 0, format, arguments);
    va_end(arguments);
    control_bye(port, reason, port->failure.text);
    return result;
}

/* ---- Out */

static void control_send(const struct netbridge *port, const void *bytes, uint32_t size)
{
    /* A dead or full socket is no error here: why the driver left is found by reading. */
    (void)!send(port->control_fd, bytes, size, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void put_header(uint8_t *message, enum message_type type)
{
    const uint32_t magic = htole32(MAGIC), length = htole32(SIZES[type]);
    const uint16_t kind = htole16((uint16_t)type), version = htole16(VERSION);
    memset(message, 0, SIZES[type]);
    memcpy(message, &magic, 4);
    memcpy(message + 4, &kind, 2);
    memcpy(message + 6, &version, 2);
    memcpy(message + 8, &length, 4);
}

void control_bye(const struct netbridge *port, enum netbridge_reason reason, const char *text)
{
    uint8_t message[BYE_BYTES];
    const uint32_t number = htole32((uint32_t)reason);
    put_header(message, BYE);
    memcpy(message + HEADER_BYTES, &number, 4);
    memcpy(message + HEADER_BYTES + 8, text, strnlen(text, BYE_TEXT_BYTES));
    control_send(port, message, sizeof(message));
}

void control_hello(const struct netbridge *port, const char *name)
{
    uint8_t message[HELLO_BYTES];
    const uint16_t version = htole16(VERSION);
    put_header(message, HELLO);
    memcpy(message + 16, &version, 2);
    memcpy(message + 18, &version, 2);
    const uint64_t offloads = htole64(port->asked_offloads);
    memcpy(message + 24, &offloads, 8);
    memcpy(message + 32, name, strnlen(name, 32));
    control_send(port, message, sizeof(message));
}

void control_ready(const struct netbridge *port)
{
    uint8_t message[READY_BYTES];
    put_header(message, READY);
    control_send(port, message, sizeof(message));
}

void control_request(const struct netbridge *port, enum message_type type, const void *body, uint32_t size)
{
    uint8_t message[FILTER_BYTES];
    const uint32_t request = htole32(port->request);
    put_header(message, type);
    memcpy(message + HEADER_BYTES, &request, 4);
    memcpy(message + HEADER_BYTES + 4, body, size);
    control_send(port, message, SIZES[type]);
}

/* ---- In */

/* Takes the fds out of what came along; those beyond FDS are closed. Returns how many there were. */
static int take_fds(struct msghdr *header, int fds[FDS])
{
    int found = 0;
    for (struct cmsghdr *each = CMSG_FIRSTHDR(header); each; each = CMSG_NXTHDR(header, each)) {
        if (each->cmsg_level != SOL_SOCKET || each->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (each->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(each) + i * sizeof(int), sizeof(int));
            if (found < FDS)
                fds[found] = fd;
            else
                close(fd);
            found++;
        }
    }
    return found;
}

static int check_message(struct netbridge *port, struct message *message, size_t size, int flags)
{
    const uint8_t *bytes = message->bytes;
    if (flags & MSG_TRUNC)
        return broken(port, NETBRIDGE_REASON_MALFORMED, "a packet longer than any message");
    if (flags & MSG_CTRUNC)
        return broken(port, NETBRIDGE_REASON_MALFORMED,
                      "more file descriptors than any message brings, or more than this process may have");
    if (size < HEADER_BYTES || get_32(bytes) != MAGIC)
        return broken(port, NETBRIDGE_REASON_MALFORMED, "a packet of %zu bytes that is no message of the port", size);
    if (get_16(bytes + 6) != VERSION)
        return broken(port, NETBRIDGE_REASON_VERSION, "a message of version %u; this side speaks %u",
                      get_16(bytes + 6), (unsigned)VERSION);
    uint16_t type = get_16(bytes + 4);
    if (type < HELLO || type > ANSWER)
        return broken(port, NETBRIDGE_REASON_MALFORMED, "a message of unknown type %u", type);
    if (get_32(bytes + 8) != size || size != SIZES[type] || get_32(bytes + 12) != 0)
        return broken(port, NETBRIDGE_REASON_MALFORMED, "%s of %zu bytes instead of %u", NAMES[type], size,
                      (unsigned)SIZES[type]);
    message->type = (enum message_type)type;
    if (type == BYE && get_32(bytes + 20) != 0)
        return broken(port, NETBRIDGE_REASON_MALFORMED, "BYE whose reserved field is not zero");
    if (type == ANSWER && (get_16(bytes + 20) > NETBRIDGE_FAILED || get_16(bytes + 22) != 0))
        return broken(port, NETBRIDGE_REASON_MALFORMED, "ANSWER with a verdict or a reserved field that may not be");
    if (type != WELCOME && message->fd_count)
        return broken(port, NETBRIDGE_REASON_MALFORMED, "file descriptors where none belong");
    return 1;
}

int control_receive(struct netbridge *port, struct message *message)
{
    union {
        char bytes[CMSG_SPACE(MOST_FDS * sizeof(int))];
        struct cmsghdr aligned;
    } ancillary;
    struct iovec data = {.iov_base = message->bytes, .iov_len = sizeof(message->bytes)};
    struct msghdr header = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = &ancillary, .msg_controllen = sizeof(ancillary)};
    ssize_t size;
    int attempts = 0;
    do
        size = recvmsg(port->control_fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    /* ECONNRESET: the driver left without reading everything; what it said before is still there. */
    while (size < 0 && (errno == EINTR || (errno == ECONNRESET && attempts++ == 0)));
    if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return 0;
    if (size < 0)
        return fail(port, NETBRIDGE_CLOSED, 0, "the driver closed the port: %s", strerror(errno));
    message->fd_count = take_fds(&header, message->fds);
    int result = size == 0 && message->fd_count == 0
                     ? fail(port, NETBRIDGE_CLOSED, 0, "the driver closed the port: it hung up")
                     : check_message(port, message, (size_t)size, header.msg_flags);
    if (result == 1 && message->type == WELCOME && message->fd_count != FDS)
        result = broken(port, NETBRIDGE_REASON_UNEXPECTED, "WELCOME with %d file descriptors instead of %d",
                        message->fd_count, FDS);
    if (result != 1)
        for (int i = 0; i < message->fd_count && i < FDS; i++)
            close(message->fds[i]);
    return result;
}

bool read_facts(const uint8_t *at, struct netbridge_facts *facts)
{
    uint16_t flags = get_16(at + 6);
    uint32_t mtu = get_32(at + 8);
    if (flags & ~(LINK_UP | ANNOUNCE) || mtu < LEAST_MTU || mtu > MOST_MTU)
        return false;
    memcpy(facts->mac, at, sizeof(facts->mac));
    facts->link_up = flags & LINK_UP;
    facts->announcements += (flags & ANNOUNCE) != 0;
    facts->mtu = mtu;
    facts->speed_mbps = get_32(at + 12);
    return true;
}

void note_answer(struct netbridge *port, const struct message *answer)
{
    if (get_32(answer->bytes + HEADER_BYTES) != port->request)
        return;
    port->answered = true;
    port->verdict = get_16(answer->bytes + HEADER_BYTES + 4);
    memcpy(port->answer_text, answer->bytes + HEADER_BYTES + 8, BYE_TEXT_BYTES);
    port->answer_text[BYE_TEXT_BYTES] = 0;
}

int closed_by(struct netbridge *port, const struct message *bye)
{
    uint32_t number = get_32(bye->bytes + HEADER_BYTES);
    int reason = number < sizeof(REASONS) / sizeof(REASONS[0]) ? (int)number : NETBRIDGE_REASON_UNSPECIFIED;
    const char *text = (const char *)bye->bytes + HEADER_BYTES + 8;
    int length = (int)strnlen(text, BYE_TEXT_BYTES);
    return fail(port, NETBRIDGE_CLOSED, reason, "the driver closed the port: %s%s%.*s%s", REASONS[reason],
                length ? " (" : "", length, text, length ? ")" : "");
}
