/* The one question of every wake-up protocol, asked again and again: one side shows something, then looks whether the
 * other sleeps; the other says that it sleeps, then looks once more. In every round at least one of them must have seen
 * the other. Without a fence between the store and the load, on both sides, now and then neither does.
 *
 * Lost wake-up between re-arm and sleep: five pairs, with the core's own code on the core's sides.
 */
#include "check.h"
#include "jitter.h"
#include "white_box.h"
#include "world.h"

#include <pthread.h>
#include <sched.h>

enum { ROUNDS = 2000 };

struct duel {
    void (*wakes)(struct world *world);  /* the sleeper's own preparation */
    void (*resets)(struct world *world); /* the shower's */
    bool (*shows)(struct world *world);  /* true: saw that the other sleeps */
    bool (*sleeps)(struct world *world); /* true: saw nothing, and sleeps */
};

static struct {
    struct world world;
    const struct duel *duel;
    uint32_t prepared; /* rounds for which the sleeper is ready, */
    uint32_t ready;    /* and the shower too, */
    uint32_t begun;    /* that have begun, */
    uint32_t shown;    /* and in which the shower has done its part */
    bool saw_sleeper;
    bool stop;
} fight;

static void wait_for(const uint32_t *word, uint32_t value)
{
    for (uint32_t turns = 0; __atomic_load_n(word, __ATOMIC_ACQUIRE) != value; turns++) {
        if (__atomic_load_n(&fight.stop, __ATOMIC_ACQUIRE))
            return;
        if (turns > 10000)
            sched_yield();
    }
}

static void tell(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

static void hesitate(uint32_t turns)
{
    for (volatile uint32_t i = turns; i > 0; i--)
        ;
}

static void *show(void *argument)
{
    (void)argument;
    for (uint32_t round = 1;; round++) {
        wait_for(&fight.prepared, round);
        if (__atomic_load_n(&fight.stop, __ATOMIC_ACQUIRE))
            return NULL;
        fight.duel->resets(&fight.world);
        drain_stores();
        tell(&fight.ready, round);
        wait_for(&fight.begun, round);
        hesitate(round * 7 % 16);
        fight.saw_sleeper = fight.duel->shows(&fight.world);
        tell(&fight.shown, round);
    }
}

/* The core's stores are late until it fences them, so that one missing fence loses a wake-up within a few rounds. Each side
 * prepares the word that the other will write, which makes the processor's own stores late as well. */
static void fight_it_out(const struct duel *duel)
{
    pthread_t thread;
    /* So few RX buffers that the pump wants to know of every one that is returned. */
    world_open(&fight.world, (struct world_config){.rx_count = 16});
    fight.duel = duel;
    CHECK_EQ(pthread_create(&thread, NULL, show, NULL), 0);
    stores_are_late = true;
    for (uint32_t round = 1; round <= ROUNDS * check_times(); round++) {
        duel->wakes(&fight.world);
        drain_stores();
        tell(&fight.prepared, round);
        wait_for(&fight.ready, round);
        tell(&fight.begun, round);
        hesitate(round * 11 % 64);
        bool asleep = duel->sleeps(&fight.world);
        wait_for(&fight.shown, round);
        if (asleep && !fight.saw_sleeper)
            FAIL("round %u: one sleeps, the other has not seen it", round);
    }
    __atomic_store_n(&fight.stop, true, __ATOMIC_RELEASE);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    instead_of_epoll_wait = NULL;
    stores_are_late = false;
    world_discard(&fight.world); /* its books are full of what never happened */
}

/* ---- The pump falls asleep while the client sends ------------------------------------------------------------- */

static void pump_wakes_up_to_no_entry(struct world *world)
{
    white_box_stop_asking(world->pump);
    forge_produced(world, TX_ACTIVE, 0);
}

static void client_sees_the_pump_awake(struct world *world)
{
    world->client.tx_active_put = 1;
    __atomic_store_n(&world->client.tx_active.header->wake, 0, __ATOMIC_RELAXED);
}

static bool client_sends(struct world *world)
{
    uint64_t rung = world->client.doorbells_sent;
    nb_client_send(&world->client, NULL, 0);
    nb_client_flush(&world->client);
    return world->client.doorbells_sent != rung;
}

static bool pump_sleeps(struct world *world) { return white_box_ask_for_wakeup(world->pump); }

TEST(pump_falls_asleep_while_the_client_sends)
{
    fight_it_out(&(struct duel){pump_wakes_up_to_no_entry, client_sees_the_pump_awake, client_sends, pump_sleeps});
}

/* ---- The pump falls asleep while the client gives buffers back ------------------------------------------------- */

static void pump_wakes_up_to_no_return(struct world *world)
{
    white_box_stop_asking(world->pump);
    forge_produced(world, RX_FREE, 0);
}

static void client_sees_the_pump_awake_again(struct world *world)
{
    world->client.rx_free_put = 1;
    __atomic_store_n(&world->client.rx_free.header->wake, 0, __ATOMIC_RELAXED);
}

static bool client_gives_back(struct world *world)
{
    uint64_t rung = world->client.doorbells_sent;
    nb_client_release(&world->client, NULL, 0);
    nb_client_flush(&world->client);
    return world->client.doorbells_sent != rung;
}

TEST(pump_falls_asleep_while_the_client_gives_back)
{
    fight_it_out(
        &(struct duel){pump_wakes_up_to_no_return, client_sees_the_pump_awake_again, client_gives_back, pump_sleeps});
}

/* ---- The pump falls asleep while the device completes --------------------------------------------------------- */

static bool completed;

static void pump_wakes_up_to_no_completion(struct world *world)
{
    white_box_stop_asking(world->pump);
    if (completed)
        fake_unpush(&world->device.rx);
    completed = false;
}

static void device_sees_the_pump_awake(struct world *world) { fake_touch_interrupts(&world->device.rx); }

static bool device_completes(struct world *world)
{
    uint64_t sent = world->device.interrupts_sent;
    fake_push(&world->device.rx, 0, HEADER + 60);
    fake_publish(&world->device.rx);
    fake_interrupt(&world->device, &world->device.rx);
    completed = true;
    return world->device.interrupts_sent != sent;
}

TEST(pump_falls_asleep_while_the_device_completes)
{
    fight_it_out(
        &(struct duel){pump_wakes_up_to_no_completion, device_sees_the_pump_awake, device_completes, pump_sleeps});
}

/* ---- The client falls asleep while the pump hands over -------------------------------------------------------- */

static bool client_slept;

/* Asleep until the other has looked, which is what the client's second look must not hide. */
static int sleep_through_the_round(int timeout)
{
    client_slept = timeout != 0;
    if (client_slept)
        wait_for(&fight.shown, fight.begun);
    return 0;
}

static void client_wakes_up_to_no_entry(struct world *world)
{
    forge_produced(world, RX_ACTIVE, 0);
    instead_of_epoll_wait = sleep_through_the_round;
}

static void pump_sees_the_client_awake(struct world *world)
{
    __atomic_store_n(&world->pump_config.rx_active.header->wake, 0, __ATOMIC_RELAXED);
}

static bool pump_hands_over(struct world *world) { return white_box_hand_over_and_wake(world->pump, 1); }

static bool client_sleeps(struct world *world)
{
    nb_client_wait(&world->client, NB_WAIT_RECEIVE, 1);
    return client_slept;
}

TEST(client_falls_asleep_while_the_pump_hands_over)
{
    fight_it_out(&(struct duel){client_wakes_up_to_no_entry, pump_sees_the_client_awake, pump_hands_over, client_sleeps});
}

/* ---- The device falls asleep while the pump sends ------------------------------------------------------------- */

static void device_wakes_up_to_no_chain(struct world *world)
{
    fake_want_notifications(&world->device.tx, false);
    fake_skip_available(&world->device.tx);
    fake_touch_interrupts(&world->device.tx);
}

static void pump_sees_the_device_awake(struct world *world) { fake_touch_notifications(&world->device.tx); }

static bool pump_publishes(struct world *world) { return white_box_publish(world->pump); }

static bool device_sleeps(struct world *world)
{
    fake_want_notifications(&world->device.tx, true);
    return fake_available(&world->device.tx) == 0;
}

TEST(device_falls_asleep_while_the_pump_sends)
{
    fight_it_out(&(struct duel){device_wakes_up_to_no_chain, pump_sees_the_device_awake, pump_publishes, device_sleeps});
}
