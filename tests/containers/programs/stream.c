/* stream serve PORT | dial ADDRESS PORT | pair PORT: two ends of a TCP connection that can prove that nothing of it was lost.
 *
 * The end that dials sends a stream without an end, as fast as the other takes it, in which every word is known by its place. The end that
 * serves reads it slowly, so that the buffers of both are full and there is always something on the way. Each says twenty times a second
 * `beat TOKEN KIB STATE END`: TOKEN is random and drawn once, KIB have gone through it; STATE is `whole`, `damaged` once a byte was not the
 * one that had to come, `closed` when the connection has ended, which nobody tries to mend; END is `sends` or `receives`. `pair` is both,
 * in two processes. Linked statically: it needs nothing from the image that it is in.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BEAT_MS = 50, PIECE = 16 << 10 };

static uint64_t token, gone; /* bytes of the stream */
static const char *state = "whole";
static const char *end = "sends";

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

static char byte(uint64_t at) /* splitmix64 of the word that it is in */
{
    uint64_t z = (at / 8 + 1) * 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return (char)((z ^ (z >> 31)) >> at % 8 * 8);
}

static void beat(void)
{
    dprintf(STDOUT_FILENO, "beat %016lx %lu %s %s\n", token, gone >> 10, state, end);
}

static struct sockaddr_in at(const char *address, const char *port)
{
    struct sockaddr_in made = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    if (!inet_aton(address, &made.sin_addr))
        fail(address);
    return made;
}

static int accepted(const char *port)
{
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in any = at("0.0.0.0", port);
    if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) || bind(listener, (void *)&any, sizeof any) ||
        listen(listener, 1))
        fail("port");
    return accept4(listener, NULL, NULL, SOCK_CLOEXEC);
}

static int dialled(const char *address, const char *port)
{
    struct sockaddr_in to = at(address, port);
    for (;; usleep(BEAT_MS * 1000)) {
        int made = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (!connect(made, (void *)&to, sizeof to))
            return made;
        close(made);
    }
}

static void receive(int from)
{
    char piece[PIECE];
    end = "receives";
    for (;; usleep(BEAT_MS * 1000)) {
        ssize_t n = *state == 'c' ? 0 : read(from, piece, sizeof piece);
        for (ssize_t i = 0; i < n; i++, gone++)
            if (piece[i] != byte(gone))
                state = "damaged";
        if (n <= 0 && *state == 'w')
            state = "closed";
        beat();
    }
}

static void send_on(int to)
{
    char piece[PIECE];
    for (int ready = 1;; ready = 0) {
        struct pollfd fd = {.fd = *state == 'c' ? -1 : to, .events = POLLOUT};
        if (!ready)
            poll(&fd, 1, BEAT_MS);
        if (fd.revents & POLLOUT) {
            for (size_t i = 0; i < sizeof piece; i++)
                piece[i] = byte(gone + i);
            ssize_t n = send(to, piece, sizeof piece, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (n < 0 && errno != EAGAIN)
                state = "closed";
            gone += n < 0 ? 0 : n;
        }
        beat();
    }
}

int main(int argc, char **argv)
{
    signal(SIGTERM, leave);
    if (getrandom(&token, sizeof token, 0) != sizeof token)
        fail("getrandom");
    if (argc == 3 && !strcmp(argv[1], "serve"))
        receive(accepted(argv[2]));
    if (argc == 4 && !strcmp(argv[1], "dial"))
        send_on(dialled(argv[2], argv[3]));
    if (argc == 3 && !strcmp(argv[1], "pair")) {
        if (fork())
            send_on(dialled("127.0.0.1", argv[2]));
        receive(accepted(argv[2]));
    }
    return 2;
}
