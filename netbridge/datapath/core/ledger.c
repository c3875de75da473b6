/* Making and freeing a ledger; its verbs are in ledger.h, inlined into the pump. */
#include "ledger.h"

#include <stdlib.h>

struct nb_ledger *nb_ledger_new(const struct nb_region *region)
{
    if (region->count == 0 || region->count > MOST_BUFFERS || region->stride <= region->headroom)
        return NULL;
    struct nb_ledger *ledger = calloc(1, sizeof(*ledger) + region->count * sizeof(ledger->buffers[0]));
    if (!ledger)
        return NULL;
    ledger->free = malloc(region->count * sizeof(ledger->free[0]));
    if (!ledger->free) {
        free(ledger);
        return NULL;
    }
    ledger->region = *region;
    ledger->handle_stem = (uint64_t)region->session << 48 | (uint64_t)region->id << 24;
    ledger->owned[NB_OWNER_DRIVER] = region->count;
    for (uint32_t i = 0; i < region->count; i++)
        ledger->free[i] = region->count - 1 - i; /* the lowest on top */
    return ledger;
}

void nb_ledger_free(struct nb_ledger *ledger)
{
    if (!ledger)
        return;
    free(ledger->free);
    free(ledger);
}

uint32_t nb_ledger_owned(const struct nb_ledger *ledger, int owner)
{
    return owner >= 0 && owner < NB_OWNERS ? ledger->owned[owner] : 0;
}
