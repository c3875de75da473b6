/* The client's side as it is, with delays in its fences. */
#include "jittered_barriers.h"

#include "client.c"
