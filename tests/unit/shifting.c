/* A program that a lazy restore fills, without CRIU: it opens a userfaultfd for itself, hands it over as CRIU does, and then its threads
 * empty, move, unmap and regrow their memory, fork, and look at it all the time. Each page is either as it was (its words are its number),
 * or what a thread has written, or zeros; any other is `wrong`, and ends it.
 *
 * Arguments: socket, threads, pieces of each, pages of a piece, rounds, seed, and letters of what it does: e(mpty), m(ove), u(nmap), r(egrow),
 * w(rite), f(ork), n (whose children fork, too), p(rotect), x (an mmap with MAP_FIXED that fails); l lets CRIU's "all is restored" come when each thread has looked at one page. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096L
#define FINISHED 0x52535446
#define DIE(what) (perror(what), exit(2))

enum { ZERO, ORIGINAL, WRITTEN };
struct piece {
    char *at; /* NULL: unmapped */
    char *kinds;
    uint64_t first; /* number of its first page */
};
struct task {
    pthread_t thread;
    struct piece *pieces;
    unsigned seed;
    long checks, changes;
};

static long threads, count, size, rounds;
static const char *does;
static pthread_barrier_t looked;

static int may(char what) { return strchr(does, what) != NULL; }

static void check(struct task *task, struct piece *piece, long n)
{
    uint64_t number = piece->first + n, wanted = 0, found;
    volatile uint64_t *page = (volatile uint64_t *)(piece->at + n * PAGE);
    if (piece->kinds[n] == ORIGINAL)
        wanted = number + 1;
    if (piece->kinds[n] == WRITTEN)
        wanted = ~number;
    for (int at = 0; at < 512; at += 511)
        if ((found = page[at]) != wanted) {
            printf("wrong page %lu, word %d: %lx, not %lx, kind %d\n", number, at, found, wanted, piece->kinds[n]);
            fflush(stdout);
            _exit(1);
        }
    task->checks++;
}

static void check_all(struct task *task)
{
    for (long i = 0; i < count; i++)
        for (long n = 0; n < size && task->pieces[i].at; n++)
            check(task, &task->pieces[i], n);
}

static void forks(struct task *task, int nested)
{
    int status;
    pid_t child = fork();
    if (child < 0)
        DIE("fork");
    if (!child) {
        if (nested)
            forks(task, nested - 1);
        check_all(task);
        _exit(0);
    }
    if (waitpid(child, &status, 0) != child || status) {
        printf("wrong in a child: %x\n", status);
        fflush(stdout);
        _exit(1);
    }
}

static void change(struct task *task)
{
    struct piece *piece = &task->pieces[rand_r(&task->seed) % count];
    long n = rand_r(&task->seed) % size, half = size / 2;
    struct rlimit limit, low;
    unsigned char there;
    const char what = does[rand_r(&task->seed) % strlen(does)];
    char *moved;
    if (what == 'f') {
        if (rand_r(&task->seed) % 64 == 0)
            forks(task, 0);
        return;
    }
    if (what == 'n') {
        if (rand_r(&task->seed) % 64 == 0)
            for (int i = 0; i < 3; i++)
                forks(task, 2);
        return;
    }
    if (!piece->at)
        return;
    task->changes++;
    switch (what) {
    case 'e':
        if (madvise(piece->at + n * PAGE, (size - n) * PAGE, MADV_DONTNEED))
            DIE("madvise");
        memset(piece->kinds + n, ZERO, size - n);
        break;
    case 'm':
        if ((moved = mremap(piece->at, size * PAGE, size * PAGE * 2, MREMAP_MAYMOVE)) == MAP_FAILED)
            DIE("mremap");
        if (munmap(moved + size * PAGE, size * PAGE))
            DIE("munmap");
        piece->at = moved;
        break;
    case 'u':
        if (rand_r(&task->seed) % 4)
            break;
        if (munmap(piece->at, size * PAGE))
            DIE("munmap");
        piece->at = NULL;
        break;
    case 'r':
        if (munmap(piece->at + half * PAGE, (size - half) * PAGE))
            DIE("munmap");
        if ((moved = mremap(piece->at, half * PAGE, size * PAGE, MREMAP_MAYMOVE)) == MAP_FAILED)
            DIE("mremap");
        piece->at = moved;
        memset(piece->kinds + half, ZERO, size - half);
        break;
    case 'x': /* more than the limit allows: nothing is unmapped, whatever is told */
        getrlimit(RLIMIT_AS, &limit);
        low = (struct rlimit){1 << 20, limit.rlim_max};
        setrlimit(RLIMIT_AS, &low);
        if (mmap(piece->at, size * PAGE + (64L << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED)
            DIE("mmap did not fail");
        setrlimit(RLIMIT_AS, &limit);
        if (mincore(piece->at, PAGE, &there)) /* before Linux 6.12 it is unmapped */
            piece->at = NULL;
        break;
    case 'p':
        if (mprotect(piece->at + n * PAGE, PAGE, PROT_READ) || mprotect(piece->at + n * PAGE, PAGE, PROT_READ | PROT_WRITE))
            DIE("mprotect");
        break;
    case 'w':
        for (int at = 0; at < 512; at++)
            ((uint64_t *)(piece->at + n * PAGE))[at] = ~(piece->first + n);
        piece->kinds[n] = WRITTEN;
    }
}

static void *run(void *argument)
{
    struct task *task = argument;
    if (may('l')) {
        check(task, &task->pieces[count / 2], 0);
        pthread_barrier_wait(&looked);
        pthread_barrier_wait(&looked);
        usleep(50000); /* of a tree that CRIU makes nobody runs before it has been heard */
    }
    for (long round = 0; round < rounds; round++) {
        change(task);
        struct piece *piece = &task->pieces[rand_r(&task->seed) % count];
        if (piece->at)
            check(task, piece, rand_r(&task->seed) % size);
    }
    check_all(task);
    return NULL;
}

static int handed_over(const char *path, char *start, size_t length)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct uffdio_api api = {.api = UFFD_API,
                             .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP};
    struct uffdio_register area = {.range = {(unsigned long)start, length}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), criu = socket(AF_UNIX, SOCK_STREAM, 0), pid = getpid();
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &area))
        DIE("userfaultfd");
    strcpy(address.sun_path, path);
    if (connect(criu, (struct sockaddr *)&address, sizeof address))
        DIE("connect");
    char byte = 0, control[CMSG_SPACE(sizeof uffd)] = {0};
    struct iovec one = {&byte, 1};
    struct msghdr message = {.msg_iov = &one, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET, head->cmsg_type = SCM_RIGHTS, head->cmsg_len = CMSG_LEN(sizeof uffd);
    memcpy(CMSG_DATA(head), &uffd, sizeof uffd);
    if (send(criu, &pid, sizeof pid, 0) < 0 || sendmsg(criu, &message, 0) < 0)
        DIE("send");
    close(uffd);
    return criu;
}

int main(int argc, char **argv)
{
    if (argc != 8)
        return 2;
    threads = atol(argv[2]), count = atol(argv[3]), size = atol(argv[4]), rounds = atol(argv[5]), does = argv[7];
    size_t length = threads * count * size * PAGE;
    char *start = mmap((void *)0x200000000, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    struct task *tasks = calloc(threads, sizeof *tasks);
    if (start == MAP_FAILED)
        DIE("mmap");
    for (long t = 0; t < threads; t++) {
        tasks[t].pieces = calloc(count, sizeof *tasks[t].pieces);
        tasks[t].seed = atol(argv[6]) * 1000 + t;
        for (long i = 0; i < count; i++) {
            struct piece *piece = &tasks[t].pieces[i];
            piece->first = (t * count + i) * size;
            piece->at = start + piece->first * PAGE;
            piece->kinds = malloc(size);
            for (long n = 0; n < size; n++) /* every seventh is in the checkpoint as zeros */
                piece->kinds[n] = (piece->first + n) % 7 ? ORIGINAL : ZERO;
        }
    }
    int criu = handed_over(argv[1], start, length), finished = FINISHED;
    pthread_barrier_init(&looked, NULL, threads + 1);
    if (!may('l') && send(criu, &finished, sizeof finished, 0) < 0)
        DIE("send");
    for (long t = 0; t < threads; t++)
        if (pthread_create(&tasks[t].thread, NULL, run, &tasks[t]))
            DIE("pthread_create");
    if (may('l')) {
        pthread_barrier_wait(&looked);
        if (send(criu, &finished, sizeof finished, 0) < 0)
            DIE("send");
        pthread_barrier_wait(&looked);
    }
    long checks = 0, changes = 0;
    for (long t = 0; t < threads; t++) {
        pthread_join(tasks[t].thread, NULL);
        checks += tasks[t].checks, changes += tasks[t].changes;
    }
    printf("good %ld %ld\n", checks, changes);
    return 0;
}
