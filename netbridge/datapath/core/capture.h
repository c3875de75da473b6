/* What the client's side calls to have its frames captured. */
#ifndef NB_CAPTURE_H
#define NB_CAPTURE_H

#include <stdint.h>

#include "core.h"

/* pcapng's codes for a packet's direction (epb_flags, bits 0 and 1). */
enum capture_direction { CAPTURE_INBOUND = 1, CAPTURE_OUTBOUND = 2 };

/* Writes these pieces of frames to `capture`'s file. They may be the client's no more afterwards. */
void capture_pieces(struct nb_capture *capture, enum capture_direction direction, const struct nb_piece *pieces,
                    uint32_t count);

#endif
