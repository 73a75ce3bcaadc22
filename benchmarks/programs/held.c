/* held MIB [KIND]: a program that holds so much memory, and can prove that it was not started again. KIND is what its memory looks like:
 *
 *     mixed      (if none is named) of each 64 MiB, or of all, if it is less: a half weights as a training job has them (float32, normally
 *                distributed), a quarter lines of JSON, a quarter zeros that were written
 *     float32    such weights; bf16: their upper halves
 *     json       a heap of JSON objects, each behind a pointer to the next and its length
 *     half-zero  what an allocator keeps: runs of 1 to 32 pages, weights and zeros that were written in turns
 *     mappings   up to 8,192 mappings that do not touch, of 64 KiB or more; by turns weights, JSON, weights, zeros
 *     processes  eight processes with an eighth each, mixed
 *
 * It says `ready` when all of it is there. A thread of its own (of each process) wakes every millisecond, and says
 *
 *     beat TOKEN NUMBER CHECKS STATE AT     about fifty times a second
 *     gap FROM TO                           whenever it woke more than 5 ms after the time before
 *
 * TOKEN is random and drawn once (by each process), NUMBER counts. SIGUSR1 has it look at all of the memory: CHECKS is how often that was
 * done, STATE is `damaged` for ever once it was not what it was at first. SIGUSR2 has it write one page of twenty anew, at random among those
 * that are not zeros, each like it was before; what it holds then is what it is to be from then on, and counts as a look. AT, FROM, TO: CLOCK_REALTIME in nanoseconds: CRIU lets a monotonic
 * clock go on from where it was.
 * SIGTERM ends it with code 0, also as pid 1. Linked statically: it needs nothing from the image that it is in.
 */

#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

enum { MIB = 1 << 20, ROUND = 64 * MIB, TICK_NS = 1000000, GAP_NS = 5000000, BEAT_TICKS = 20, LINE = 160, LANES = 4 };
enum { PAGE = 4096, RUN_PAGES = 32, MAPPINGS = 8192, MAPPING = 64 << 10, PROCESSES = 8, CHANGED = 20 };

struct region {
    uint8_t *at;
    size_t size;
};

static uint64_t token, seed, checks;
static int damaged;
static struct region regions[MAPPINGS];
static size_t count; /* of them */

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

static void fill_bf16(uint16_t *at, size_t bytes)
{
    union {
        float whole[2];
        uint16_t halves[4]; /* the upper ones are the odd ones */
    } drawn;
    for (size_t n = 0; n < bytes / sizeof *at; n += 2) {
        fill_weights(drawn.whole, sizeof drawn.whole);
        at[n] = drawn.halves[1];
        at[n + 1] = drawn.halves[3];
    }
}

struct object {
    struct object *next;
    size_t length;
    char text[];
};

static void fill_text(char *at, size_t bytes, int heap)
{
    static const char *const names[] = {"attention.query", "attention.key", "attention.value", "mlp.up", "mlp.down", "norm"};
    static uint64_t step;
    for (char *end = at + bytes; at < end; step++) {
        char line[LINE];
        uint64_t drawn = chance();
        int length = snprintf(line, LINE, "{\"step\": %lu, \"name\": \"layers.%lu.%s.weight\", \"loss\": %.6f, \"seen\": %lu}\n", step,
                              drawn % 97, names[(drawn >> 8) % 6], (double)unit(), (drawn >> 16) % 100000);
        if (heap && end - at > (ptrdiff_t)sizeof(struct object)) {
            struct object *object = (struct object *)at;
            size_t whole = (sizeof *object + length + 15) / 16 * 16; /* malloc's steps */
            object->length = length;
            object->next = (struct object *)(at + whole);
            at = object->text;
        }
        length = length < end - at ? length : (int)(end - at);
        memcpy(at, line, length);
        at += heap ? (length + 15) / 16 * 16 : length;
    }
}

static void fill_half(uint8_t *at, size_t bytes)
{
    for (uint8_t *end = at + bytes; at < end;) {
        size_t run = (chance() % RUN_PAGES + 1) * PAGE, left = end - at;
        run = 2 * run < left ? run : left / 2;
        fill_weights((float *)at, run);
        memset(at + run, 0, run);
        at += 2 * run;
    }
}

static void fill_mixed(uint8_t *at, size_t bytes)
{
    size_t round = bytes < ROUND ? bytes : ROUND;
    for (uint8_t *end = at + bytes; at + round <= end; at += round) {
        fill_weights((float *)at, round / 2);
        fill_text((char *)at + round / 2, round / 4, 0);
        memset(at + round / 4 * 3, 0, round / 4);
    }
}

static void fill(const char *kind)
{
    for (size_t n = 0; n < count; n++) {
        uint8_t *at = regions[n].at;
        size_t bytes = regions[n].size;
        if (!strcmp(kind, "float32") || (!strcmp(kind, "mappings") && n % 2 == 0))
            fill_weights((float *)at, bytes);
        else if (!strcmp(kind, "bf16"))
            fill_bf16((uint16_t *)at, bytes);
        else if (!strcmp(kind, "json") || (!strcmp(kind, "mappings") && n % 4 == 1))
            fill_text((char *)at, bytes, !strcmp(kind, "json"));
        else if (!strcmp(kind, "half-zero"))
            fill_half(at, bytes);
        else if (!strcmp(kind, "mappings"))
            memset(at, 0, bytes);
        else
            fill_mixed(at, bytes);
    }
}

/* Memory in mappings that do not touch: a page between two of them is given back. */
static int map(size_t bytes, size_t each)
{
    for (count = 0; count < bytes / each; count++) {
        uint8_t *at = mmap(NULL, each + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED || munmap(at + each, PAGE))
            return -1;
        regions[count] = (struct region){at, each};
    }
    return 0;
}

static uint64_t look(void)
{
    uint64_t sums[LANES] = {1, 2, 3, 4};
    for (size_t each = 0; each < count; each++) {
        const uint64_t *words = (uint64_t *)regions[each].at;
        for (size_t n = 0; n < regions[each].size / sizeof *words; n += LANES)
            for (int lane = 0; lane < LANES; lane++)
                sums[lane] = (sums[lane] ^ words[n + lane]) * 0x9e3779b97f4a7c15 + n;
    }
    return sums[0] ^ sums[1] << 1 ^ sums[2] << 2 ^ sums[3] << 3;
}

static int is_zeros(const uint8_t *page)
{
    return !*page && !memcmp(page, page + 1, PAGE - 1);
}

static void change(const char *kind)
{
    for (size_t n = 0; n < count; n++)
        for (uint8_t *page = regions[n].at; page < regions[n].at + regions[n].size; page += PAGE) {
            if (chance() % CHANGED || is_zeros(page))
                continue;
            if (!strcmp(kind, "bf16"))
                fill_bf16((uint16_t *)page, PAGE);
            else if (memmem(page, PAGE, "\"step\"", 6))
                fill_text((char *)page, PAGE, !strcmp(kind, "json"));
            else
                fill_weights((float *)page, PAGE);
        }
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
    static const char *const kinds[] = {"mixed", "float32", "bf16", "json", "half-zero", "mappings", "processes"};
    size_t size = argc > 1 ? strtoul(argv[1], NULL, 10) * MIB : 0, known = 0;
    const char *kind = argc > 2 ? argv[2] : kinds[0];
    for (size_t n = 0; n < sizeof kinds / sizeof *kinds; n++)
        known |= !strcmp(kind, kinds[n]);
    pid_t others[PROCESSES - 1];
    int here = 1, forked = 0; /* processes */
    if (!strcmp(kind, "processes"))
        for (size /= PROCESSES; here && forked < PROCESSES - 1; forked += here)
            here = (others[forked] = fork()) > 0;
    forked = here ? forked : 0;

    size_t least = size / MAPPINGS > MAPPING ? size / MAPPINGS : MAPPING;
    if (!known || !size || size % (size < ROUND ? MIB : ROUND) || map(size, strcmp(kind, "mappings") ? size : least) ||
        getrandom(&token, sizeof token, 0) != sizeof token) {
        fprintf(stderr, "held MIB [KIND]: some, and if more than 64, whole 64 (for each process); of a kind that there is\n");
        return 2;
    }
    seed = token | 1;
    fill(kind);
    uint64_t first = look();

    sigset_t wanted;
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGUSR1);
    sigaddset(&wanted, SIGUSR2);
    sigaddset(&wanted, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &wanted, NULL);
    pthread_t heart;
    if (pthread_create(&heart, NULL, beat, NULL))
        return 1;
    say("ready\n", 6);
    for (int number; !sigwait(&wanted, &number) && number != SIGTERM;) {
        damaged |= look() != first;
        if (number == SIGUSR2) {
            change(kind);
            first = look();
        }
        __atomic_add_fetch(&checks, 1, __ATOMIC_RELEASE);
    }
    while (forked)
        kill(others[--forked], SIGTERM);
    return 0;
}
