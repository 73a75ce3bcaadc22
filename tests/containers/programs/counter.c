/* counter [-m MIB] [-p PORT] [-f FILE]: a program that can prove that it was not started again.
 *
 * Twenty times a second, and after each answer, it says `beat TOKEN NUMBER MIB STATE`: TOKEN is random and drawn once, NUMBER counts,
 * STATE is `whole` while its MIB of memory are what TOKEN made of them, and `damaged` for ever once they are not. Each beat looks at one
 * more piece of the memory, an answer at all of it: whoever sends a line to PORT gets such a line back. FILE always holds the last one.
 * SIGTERM ends it with code 0, also as pid 1. Linked statically: it needs nothing from the image that it is in.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MIB_WORDS = (1 << 20) / sizeof(uint64_t), BEAT_MS = 50, CLIENTS = 16, LINE = 128 };

static uint64_t token, number;
static uint64_t *memory;
static size_t mib = 1;
static int damaged;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void leave(int unused)
{
    (void)unused;
    _exit(0);
}

static uint64_t word(size_t at) /* splitmix64: what any word must be is known without the others */
{
    uint64_t z = token + (at + 1) * 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static void look_at(size_t piece)
{
    for (size_t at = piece * MIB_WORDS; at < (piece + 1) * MIB_WORDS; at++)
        damaged |= memory[at] != word(at);
}

static int beat(char line[LINE])
{
    return snprintf(line, LINE, "beat %016lx %lu %zu %s\n", token, number, mib, damaged ? "damaged" : "whole");
}

static void answer(int client)
{
    char line[LINE];
    for (size_t piece = 0; piece < mib; piece++)
        look_at(piece);
    if (write(client, line, beat(line)) < 0) {
        /* who asked has gone */
    }
}

static int listen_on(int port)
{
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) || bind(fd, (void *)&any, sizeof any) || listen(fd, CLIENTS))
        fail("port");
    return fd;
}

static void serve(struct pollfd *fds, nfds_t *count, int listener) /* one beat long, or until there was something to do */
{
    if (poll(fds, *count, BEAT_MS) <= 0)
        return;
    for (nfds_t at = 0; at < *count; at++) {
        char said[LINE];
        if (!fds[at].revents)
            continue;
        if (fds[at].fd == listener) {
            int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
            if (client >= 0 && *count == CLIENTS)
                close(client);
            else if (client >= 0)
                fds[(*count)++] = (struct pollfd){.fd = client, .events = POLLIN};
        } else if (read(fds[at].fd, said, sizeof said) > 0) {
            answer(fds[at].fd);
        } else {
            close(fds[at].fd);
            fds[at--] = fds[--*count];
        }
    }
}

int main(int argc, char **argv)
{
    int port = 0, file = -1, listener = -1;
    for (int option; (option = getopt(argc, argv, "m:p:f:")) != -1;) {
        switch (option) {
        case 'm': mib = strtoul(optarg, NULL, 10); break;
        case 'p': port = atoi(optarg); break;
        case 'f':
            file = open(optarg, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
            if (file < 0)
                fail(optarg);
            break;
        default: return 2;
        }
    }
    signal(SIGTERM, leave);
    signal(SIGPIPE, SIG_IGN);
    if (getrandom(&token, sizeof token, 0) != sizeof token)
        fail("getrandom");
    memory = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("memory");
    for (size_t at = 0; at < mib * MIB_WORDS; at++)
        memory[at] = word(at);

    struct pollfd fds[CLIENTS];
    nfds_t count = 0;
    if (port) {
        listener = listen_on(port);
        fds[count++] = (struct pollfd){.fd = listener, .events = POLLIN};
    }
    for (;; number++) {
        char line[LINE];
        look_at(number % mib);
        int length = beat(line);
        if (write(STDOUT_FILENO, line, length) < 0 || (file >= 0 && pwrite(file, line, length, 0) < 0)) {
            /* a log that is gone or full is no reason to stop counting */
        }
        serve(fds, &count, listener);
    }
}
