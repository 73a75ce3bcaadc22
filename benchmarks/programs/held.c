/* held MIB: a program that holds so much memory, and can prove that it was not started again.
 *
 * Of each 64 MiB (of all, if it is less) a half is weights as a training job has them (float32, normally distributed), a quarter lines of
 * JSON, a quarter zeros that were written. It says `ready` when all of it is there. A thread of its own wakes every millisecond, and says
 *
 *     beat TOKEN NUMBER CHECKS STATE AT     about fifty times a second
 *     gap FROM TO                           whenever it woke more than 5 ms after the time before
 *
 * TOKEN is random and drawn once, NUMBER counts. SIGUSR1 has it look at all of the memory: CHECKS is how often that was done, STATE is
 * `damaged` for ever once it was not what it was at first. AT, FROM, TO: CLOCK_REALTIME in nanoseconds: CRIU lets a monotonic clock go on from
 * where it was.
 * SIGTERM ends it with code 0, also as pid 1. Linked statically: it needs nothing from the image that it is in.
 */

#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

enum { MIB = 1 << 20, ROUND = 64 * MIB, TICK_NS = 1000000, GAP_NS = 5000000, BEAT_TICKS = 20, LINE = 160, LANES = 4 };

static uint64_t token, seed, checks;
static int damaged;
static uint8_t *memory;
static size_t size;

static uint64_t chance(void) /* xorshift64* */
{
    seed ^= seed >> 12;
    seed ^= seed << 25;
    seed ^= seed >> 27;
    return seed * 0x2545f4914f6cdd1d;
}

static float unit(void) /* more than 0, at most 1 */
{
    return (float)((chance() >> 40) + 1) / (1 << 24);
}

static void fill_weights(float *at, size_t bytes)
{
    for (size_t n = 0; n < bytes / sizeof *at; n += 2) {
        float radius = 0.02f * sqrtf(-2 * logf(unit())), angle = 2 * (float)M_PI * unit();
        at[n] = radius * cosf(angle);
        at[n + 1] = radius * sinf(angle);
    }
}

static void fill_text(char *at, size_t bytes)
{
    static const char *const names[] = {"attention.query", "attention.key", "attention.value", "mlp.up", "mlp.down", "norm"};
    static uint64_t step;
    for (char *end = at + bytes; at < end; step++) {
        char line[LINE];
        uint64_t drawn = chance();
        int length = snprintf(line, LINE, "{\"step\": %lu, \"name\": \"layers.%lu.%s.weight\", \"loss\": %.6f, \"seen\": %lu}\n", step,
                              drawn % 97, names[(drawn >> 8) % 6], (double)unit(), (drawn >> 16) % 100000);
        length = length < end - at ? length : (int)(end - at);
        memcpy(at, line, length);
        at += length;
    }
}

static void fill(void)
{
    size_t round = size < ROUND ? size : ROUND;
    for (size_t at = 0; at + round <= size; at += round) {
        fill_weights((float *)(memory + at), round / 2);
        fill_text((char *)memory + at + round / 2, round / 4);
        memset(memory + at + round / 4 * 3, 0, round / 4);
    }
}

static uint64_t look(void)
{
    uint64_t sums[LANES] = {1, 2, 3, 4}, *words = (uint64_t *)memory;
    for (size_t n = 0; n < size / sizeof *words; n += LANES)
        for (int lane = 0; lane < LANES; lane++)
            sums[lane] = (sums[lane] ^ words[n + lane]) * 0x9e3779b97f4a7c15 + n;
    return sums[0] ^ sums[1] << 1 ^ sums[2] << 2 ^ sums[3] << 3;
}

static int64_t now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    return at.tv_sec * INT64_C(1000000000) + at.tv_nsec;
}

static void say(const char *line, int length)
{
    if (write(STDOUT_FILENO, line, length) < 0) {
        /* a log that is gone is no reason to stop counting */
    }
}

static void *beat(void *unused)
{
    uint64_t number = 0;
    int64_t before = now();
    for (uint64_t ticks = 0;; ticks++) {
        char line[LINE];
        int64_t at = now();
        if (at - before > GAP_NS)
            say(line, snprintf(line, LINE, "gap %ld %ld\n", before, at));
        if (ticks % BEAT_TICKS == 0 || at - before > GAP_NS)
            say(line, snprintf(line, LINE, "beat %016lx %lu %lu %s %ld\n", token, number++, __atomic_load_n(&checks, __ATOMIC_ACQUIRE),
                               damaged ? "damaged" : "whole", at));
        before = at;
        nanosleep(&(struct timespec){.tv_nsec = TICK_NS}, NULL);
    }
    return unused;
}

int main(int argc, char **argv)
{
    size = argc > 1 ? strtoul(argv[1], NULL, 10) * MIB : 0;
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!size || size % (size < ROUND ? MIB : ROUND) || memory == MAP_FAILED || getrandom(&token, sizeof token, 0) != sizeof token) {
        fprintf(stderr, "held MIB: some, and if more than 64, whole 64\n");
        return 2;
    }
    seed = token | 1;
    fill();
    uint64_t first = look();

    sigset_t wanted;
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGUSR1);
    sigaddset(&wanted, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &wanted, NULL);
    pthread_t heart;
    if (pthread_create(&heart, NULL, beat, NULL))
        return 1;
    say("ready\n", 6);
    for (int number; !sigwait(&wanted, &number) && number != SIGTERM;) {
        damaged |= look() != first;
        __atomic_add_fetch(&checks, 1, __ATOMIC_RELEASE);
    }
    return 0;
}
