/* api.h for C: cffi reads that file bare, so its guard and what it needs stand here. */
#ifndef NB_CORE_H
#define NB_CORE_H

#include <stdbool.h>
#include <stdint.h>

#include "api.h"

/* As many as a handle's index can name. */
enum { MOST_BUFFERS = 1 << 24 };

#endif
