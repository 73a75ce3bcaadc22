/*
 * fakecuda.c - test double of libcuda.so.1 for checkpoint/restore tests without a GPU.
 *
 * One library, both sides of the protocol:
 *   target side      cuInit, contexts, memory, copies, kernels that spin, and a thread that serves checkpoint requests;
 *   controller side  cuCheckpointProcess*, called from another process with the target's pid.
 * It imitates documented and publicly reported behaviour only; it contains nothing of any driver, and knows nothing of hibernode. What
 * no document says is marked "a guess".
 *
 * The machine is the folder FAKE_CUDA_ROOT (default /dev/shm/fakecuda):
 *   devices               a line per GPU: "GPU-<uuid> <bytes>"; "MIG-<uuid> <bytes>" for a slice, whose checkpoint is refused
 *   chips                 optional, a line per GPU: "GPU-<uuid> <chip>"; without it all are of one chip
 *   namespace             optional: the inode of the pid namespace in which pids are meant
 *   <uuid>/<pid>          bytes that process uses on that GPU, locked (flock) while it lives; "<pid>@<namespace>" for one of another
 *                         pid namespace, by its pid there
 *   locks/<pid>           one request at a time for each target; locks/machine: the ledgers
 *   faults/<pid>/<call>   what the next such call on that process does; see faults_of(). "any" instead of a pid: on whichever process.
 *                         The pid is the one that the caller used. Calls: state, lock, checkpoint, restore, unlock
 *   calls                 if it is there: each target writes into it what it has served, before it answers: "<pid> <call> <CUresult>".
 *                         Not who only asked for a state or a thread
 *
 * A pid that a caller names is one of the caller's pid namespace, as with a real driver, whichever namespace the process is in: it is looked
 * for in /proc. A process that is in another one needs this folder under some name, and a /proc of its own.
 *
 * Environment of the target:
 *   CUDA_VISIBLE_DEVICES  as CUDA has it: indices or UUIDs, a comma between them; absent: all
 *   FAKE_CUDA_DEVICE      a device node that is held open while there is device state; without it a userfaultfd or a landlock ruleset.
 *                         CRIU must refuse it, as it refuses /dev/nvidia*. With %d for the number of the first GPU that it uses, by its
 *                         line in `devices`: a node that is not there means 801 for a restore, as reported (ai-dynamo/snapshot #37)
 *   FAKE_CUDA_LEFTOVER    "fd": a second descriptor of the device stays open whatever is called
 *   FAKE_CUDA_GBPS        how fast device memory is copied (10^9 bytes a second); absent: as fast as memory
 *   FAKE_CUDA_MAP         "box": a GPU map has to name every GPU of the machine, as in cuda-python PR 1983; else every visible one
 *   FAKE_CUDA_HANG_LIMIT  seconds after which a hang ends by itself (60)
 * Of both sides:
 *   FAKE_DRIVER_PROFILE   r550 ... r615 (r580): which symbols there are, and what they can do
 *   FAKE_CUDA_VERSION     what cuDriverGetVersion answers, where it is not the profile's
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* CUresult values, as published in cuda.h */
enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
    OPERATING_SYSTEM = 304, ILLEGAL_STATE = 401, NOT_FOUND = 500, NOT_READY = 600, NOT_PERMITTED = 800, NOT_SUPPORTED = 801, UNKNOWN = 999
};
/* CUprocessState values */
enum { RUNNING, LOCKED, CHECKPOINTED, FAILED };

#define MAX_GPUS   16
#define MAX_PAIRS  16
#define MAX_ALLOCS 256
#define CONTEXT_BYTES (64L << 20)        /* what a context costs on the device */
#define FIRST_FD   200                   /* keeps our descriptors away from the application's */

enum { OP_STATE, OP_TID, OP_LOCK, OP_CHECKPOINT, OP_RESTORE, OP_UNLOCK };
static const char *const op_names[] = { "state", "tid", "lock", "checkpoint", "restore", "unlock" };

struct fault { int hang, die, failed, done, once, answer; unsigned delay_ms; int code; char who[16]; };
struct pair { char old_uuid[16], new_uuid[16]; };
struct request { uint32_t seq, op, timeout_ms, npairs; struct fault fault; struct pair pairs[MAX_PAIRS]; };
struct response { uint32_t seq; int rc, value; };

/* ------------------------------------------------------------------ the driver's version */

static int version(void)
{
    static const struct { const char *profile; int cuda; } known[] = {
        { "r550", 12040 }, { "r555", 12050 }, { "r560", 12060 }, { "r565", 12070 }, { "r570", 12080 }, { "r575", 12090 },
        { "r580", 13000 }, { "r590", 13010 }, { "r595", 13020 }, { "r610", 13030 }, { "r615", 13040 } };
    const char *p = getenv("FAKE_DRIVER_PROFILE");
    if (!p || !*p)
        return 13000;
    for (unsigned i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(p, known[i].profile))
            return known[i].cuda;
    fprintf(stderr, "fakecuda: FAKE_DRIVER_PROFILE=%s is no profile\n", p);
    abort();
}

static int has_checkpoint_api(void) { return version() >= 12080; }
static int has_remap(void) { return version() >= 13000; }

/* ------------------------------------------------------------------ the machine */

static const char *root(void)
{
    const char *r = getenv("FAKE_CUDA_ROOT");
    return r ? r : "/dev/shm/fakecuda";
}

static int hexval(int c) { return c <= '9' ? c - '0' : (c | 32) - 'a' + 10; }

static void uuid_to_bytes(const char *s, char *b)
{
    if (!strncmp(s, "GPU-", 4) || !strncmp(s, "MIG-", 4))
        s += 4;
    for (int i = 0; i < 16; i++, s += 2) {
        while (*s == '-')
            s++;
        b[i] = hexval(s[0]) * 16 + hexval(s[1]);
    }
}

static void uuid_to_text(const char *b, char *s)
{
    s += sprintf(s, "GPU-");
    for (int i = 0; i < 16; i++)
        s += sprintf(s, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", (unsigned char)b[i]);
}

struct gpu { char uuid[48], chip[48]; long total; };

static int list_gpus(struct gpu *g, int max)
{
    char path[300], uuid[48], chip[48];
    int n = 0;
    snprintf(path, sizeof path, "%s/devices", root());
    FILE *f = fopen(path, "re");
    if (!f)
        return 0;
    while (n < max && fscanf(f, "%47s %ld", g[n].uuid, &g[n].total) == 2)
        strcpy(g[n++].chip, "");
    fclose(f);
    snprintf(path, sizeof path, "%s/chips", root());
    if ((f = fopen(path, "re"))) {
        while (fscanf(f, "%47s %47s", uuid, chip) == 2)
            for (int i = 0; i < n; i++)
                if (!strcmp(g[i].uuid, uuid))
                    strcpy(g[i].chip, chip);
        fclose(f);
    }
    return n;
}

static const struct gpu *find_gpu(const struct gpu *g, int n, const char *uuid)
{
    for (int i = 0; i < n; i++)
        if (!strcmp(g[i].uuid, uuid))
            return g + i;
    return 0;
}

/* a lock file of the machine; -1 if that cannot be had. close() lets go */
static int lock_file(const char *name)
{
    char path[400];
    snprintf(path, sizeof path, "%s/locks", root());
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/locks/%s", root(), name);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666), rc;
    if (fd < 0)
        return -1;
    do
        rc = flock(fd, LOCK_EX);
    while (rc && errno == EINTR);
    return fd;
}

/* Bytes in use on one GPU: the sum of its ledgers. One that nobody has locked is of a dead process, and goes. With the machine locked. */
static long used_bytes(const char *uuid)
{
    char dir[300];
    long sum = 0;
    struct dirent *e;
    snprintf(dir, sizeof dir, "%s/%s", root(), uuid);
    DIR *d = opendir(dir);
    if (!d)
        return 0;
    while ((e = readdir(d))) {
        char file[600], text[64];
        if (e->d_name[0] == '.')
            continue;
        snprintf(file, sizeof file, "%s/%s", dir, e->d_name);
        int fd = open(file, O_RDWR | O_CLOEXEC);
        if (fd < 0)
            continue;
        if (!flock(fd, LOCK_EX | LOCK_NB)) {
            unlink(file);
        } else {
            ssize_t k = read(fd, text, sizeof text - 1);
            text[k < 0 ? 0 : k] = 0;
            sum += atol(text);
        }
        close(fd);
    }
    closedir(d);
    return sum;
}

/* ------------------------------------------------------------------ target side */

struct view { char uuid[48]; int context, ledger; };               /* a GPU that this process sees; ledger: a descriptor, or -1 */
struct alloc { uint64_t dptr; size_t size; char *dev, *host; int gpu; };

static struct {
    pthread_mutex_t m;
    pthread_cond_t c;
    int inited, owner, state, draining;
    int in_api, in_flight;              /* calls inside the library; "kernels" still running */
    int reqfd, rspfd, devfd, extrafd;   /* devfd: -1 while no device is open */
    int managed, ipc, doomed;
    struct view g[MAX_GPUS];
    int ng;
    struct alloc a[MAX_ALLOCS];
    int na;
    uint64_t next;
} T = { .m = PTHREAD_MUTEX_INITIALIZER, .c = PTHREAD_COND_INITIALIZER, .devfd = -1, .extrafd = -1 };

static __thread int current = -1;       /* the GPU of this thread's context */

static int move_up(int fd)
{
    int n = fcntl(fd, F_DUPFD_CLOEXEC, FIRST_FD);
    close(fd);
    return n;
}

static long need_on(int gpu)
{
    long sum = T.g[gpu].context ? CONTEXT_BYTES : 0;
    for (int i = 0; i < T.na; i++)
        if (T.a[i].gpu == gpu)
            sum += T.a[i].size;
    return sum;
}

/* the pid namespace of this process, if it is not the machine's: its pids then mean nothing to others */
static unsigned long foreign_namespace(void)
{
    char path[300], link[64] = "";
    unsigned long machine = 0, mine;
    snprintf(path, sizeof path, "%s/namespace", root());
    FILE *f = fopen(path, "re");
    if (f) {
        if (fscanf(f, "%lu", &machine) != 1)
            machine = 0;
        fclose(f);
    }
    if (!machine || readlink("/proc/self/ns/pid", link, sizeof link - 1) < 0)
        return 0;
    mine = strtoul(link + strlen("pid:["), 0, 10);
    return mine == machine ? 0 : mine;
}

/* make this process's ledgers say what it uses: nothing, while the device is closed. With the machine locked. */
static void account(void)
{
    char dir[300], file[400], text[32];
    unsigned long ns = foreign_namespace();
    for (int i = 0; i < T.ng; i++) {
        struct view *g = &T.g[i];
        long sum = T.devfd < 0 ? 0 : need_on(i);
        snprintf(dir, sizeof dir, "%s/%s", root(), g->uuid);
        snprintf(file, sizeof file, ns ? "%s/%d@%lu" : "%s/%d", dir, getpid(), ns);
        if (!sum) {
            if (g->ledger >= 0) {
                unlink(file);
                close(g->ledger);
                g->ledger = -1;
            }
            continue;
        }
        if (g->ledger < 0) {
            mkdir(dir, 0777);
            int fd = open(file, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
            if (fd < 0)
                continue;
            g->ledger = move_up(fd);
            flock(g->ledger, LOCK_EX);
        }
        int n = snprintf(text, sizeof text, "%ld", sum);
        if (pwrite(g->ledger, text, n, 0) != n || ftruncate(g->ledger, n))
            abort();
    }
}

/* a descriptor CRIU refuses to dump, as it refuses /dev/nvidia*; of the machine's GPU of that UUID */
static int open_device(const char *uuid)
{
    uint64_t handled_access_fs = 1;
    const char *node = getenv("FAKE_CUDA_DEVICE");
    struct gpu g[MAX_GPUS];
    char path[300];
    int fd;
    if (node && *node) {
        const char *at = strstr(node, "%d");
        const struct gpu *it = find_gpu(g, list_gpus(g, MAX_GPUS), uuid);
        snprintf(path, sizeof path, "%s", node);
        if (at && it)
            snprintf(path, sizeof path, "%.*s%d%s", (int)(at - node), node, (int)(it - g), at + 2);
        fd = open(path, O_RDONLY | O_CLOEXEC);
    } else {
        fd = syscall(SYS_userfaultfd, 1 /* UFFD_USER_MODE_ONLY */ | O_CLOEXEC);
        if (fd < 0)
            fd = syscall(444 /* landlock_create_ruleset */, &handled_access_fs, sizeof handled_access_fs, 0);
    }
    return fd < 0 ? -1 : move_up(fd);
}

static char *map_device(size_t n)
{
    char *p = mmap(0, n, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? 0 : p;
}

static void sleep_ms(double ms)
{
    struct timespec t = { (time_t)(ms / 1e3), 0 };
    t.tv_nsec = (long)((ms - t.tv_sec * 1e3) * 1e6);
    while (nanosleep(&t, &t) && errno == EINTR)
        ;
}

static void copy(char *to, const char *from, size_t n)
{
    const char *gbps = getenv("FAKE_CUDA_GBPS");
    memcpy(to, from, n);
    if (gbps && atof(gbps) > 0)
        sleep_ms(n / atof(gbps) / 1e6);
}

/* block new API calls, wait for calls and kernels in flight; on timeout stay RUNNING */
static int do_lock(unsigned ms)
{
    struct timespec until;
    int rc = OK;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += ms / 1000;
    until.tv_nsec += (ms % 1000) * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    if (T.state != RUNNING)
        return ILLEGAL_STATE;
    T.draining = 1;
    while ((T.in_api || T.in_flight) && rc == OK)
        if ((ms ? pthread_cond_timedwait(&T.c, &T.m, &until) : pthread_cond_wait(&T.c, &T.m)) == ETIMEDOUT)
            rc = NOT_READY;
    T.draining = 0;
    if (rc == OK)
        T.state = LOCKED;
    else
        pthread_cond_broadcast(&T.c);
    return rc;
}

/* "does not attempt to keep the process in a good state": that this is FAILED, and that API calls then block, is a guess */
static int fail(int rc)
{
    T.state = FAILED;
    return rc;
}

/* device memory -> private anonymous host memory of the target; device closed; ledger emptied */
static int do_checkpoint(void)
{
    if (T.state != LOCKED)
        return ILLEGAL_STATE;
    if (T.managed || T.ipc)
        return fail(NOT_SUPPORTED);
    for (int i = 0; i < T.ng; i++)
        if (!strncmp(T.g[i].uuid, "MIG-", 4))
            return fail(OUT_OF_MEMORY); /* cuda-checkpoint #42 */
    for (int i = 0; i < T.na; i++) {
        struct alloc *a = &T.a[i];
        a->host = mmap(0, a->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (a->host == MAP_FAILED)
            return fail(OUT_OF_MEMORY);
        copy(a->host, a->dev, a->size);
        munmap(a->dev, a->size);
        a->dev = 0;
    }
    close(T.devfd);
    T.devfd = -1;
    int machine = lock_file("machine");
    account();
    close(machine);
    T.state = CHECKPOINTED;
    return OK;
}

/* The new UUID of each GPU of this process. The map has to name every GPU, by documents those checkpointed, by report the visible ones or
 * all of the machine; each once; and each new one has to be there. */
static int remapped(const struct request *r, const struct gpu *box, int nbox, char uuids[][48])
{
    const char *rule = getenv("FAKE_CUDA_MAP");
    char mine[16], text[48];
    for (int i = 0; i < T.ng; i++)
        strcpy(uuids[i], T.g[i].uuid);
    if (!r->npairs)
        return OK;
    for (unsigned i = 0; i < r->npairs; i++) {
        uuid_to_text(r->pairs[i].new_uuid, text);
        if (!find_gpu(box, nbox, text))
            return INVALID_VALUE;
        for (unsigned j = 0; j < i; j++)
            if (!memcmp(r->pairs[i].old_uuid, r->pairs[j].old_uuid, 16) || !memcmp(r->pairs[i].new_uuid, r->pairs[j].new_uuid, 16))
                return INVALID_VALUE;
    }
    for (int i = 0; i < T.ng; i++) {
        int hit = 0;
        uuid_to_bytes(T.g[i].uuid, mine);
        for (unsigned j = 0; j < r->npairs; j++)
            if (!memcmp(mine, r->pairs[j].old_uuid, 16)) {
                uuid_to_text(r->pairs[j].new_uuid, uuids[i]);
                hit = 1;
            }
        if (!hit)
            return INVALID_VALUE;
    }
    for (int i = 0; rule && !strcmp(rule, "box") && i < nbox; i++) {
        int hit = !strncmp(box[i].uuid, "MIG-", 4); /* no map can name a slice */
        uuid_to_bytes(box[i].uuid, mine);
        for (unsigned j = 0; j < r->npairs; j++)
            hit |= !memcmp(mine, r->pairs[j].old_uuid, 16);
        if (!hit)
            return INVALID_VALUE;
    }
    return OK;
}

/* With the machine locked: is there room for all of this process on those GPUs, and are they of the chip they were? */
static int fitting(const struct gpu *box, int nbox, char uuids[][48])
{
    for (int i = 0; i < T.ng; i++) {
        const struct gpu *to = find_gpu(box, nbox, uuids[i]), *from = find_gpu(box, nbox, T.g[i].uuid);
        if (!to || (from && strcmp(from->chip, to->chip)))
            return fail(NOT_SUPPORTED);
        if (used_bytes(to->uuid) + need_on(i) > to->total) {
            T.doomed = 1; /* cuda-checkpoint #44: every later attempt is 304, the state stays CHECKPOINTED */
            return OUT_OF_MEMORY;
        }
    }
    return OK;
}

static int do_restore(const struct request *r)
{
    char uuids[MAX_GPUS][48];
    struct gpu box[MAX_GPUS];
    int nbox = list_gpus(box, MAX_GPUS), rc;
    if (T.state != CHECKPOINTED)
        return ILLEGAL_STATE;
    if (T.doomed)
        return OPERATING_SYSTEM;
    if ((rc = remapped(r, box, nbox, uuids)))
        return rc;
    int machine = lock_file("machine");
    if (!(rc = fitting(box, nbox, uuids)) && (T.devfd = open_device(uuids[0])) < 0)
        rc = fail(NOT_SUPPORTED);
    if (!rc) {
        for (int i = 0; i < T.ng; i++)
            strcpy(T.g[i].uuid, uuids[i]);
        account();
    }
    close(machine);
    for (int i = 0; !rc && i < T.na; i++) {
        struct alloc *a = &T.a[i];
        if (!(a->dev = map_device(a->size)))
            return fail(OUT_OF_MEMORY);
        copy(a->dev, a->host, a->size);
        munmap(a->host, a->size);
        a->host = 0;
    }
    if (!rc)
        T.state = LOCKED;
    return rc;
}

static int do_unlock(void)
{
    if (T.state != LOCKED)
        return ILLEGAL_STATE;
    T.state = RUNNING;
    pthread_cond_broadcast(&T.c);
    return OK;
}

/* what a fault does before the call is served; whether it is served at all */
static int struck(const struct request *r)
{
    const struct fault *f = &r->fault;
    char path[400];
    const char *limit = getenv("FAKE_CUDA_HANG_LIMIT");
    double left = (limit ? atof(limit) : 60) * 1e3;
    snprintf(path, sizeof path, "%s/faults/%s/%s", root(), f->who, op_names[r->op]);
    while (f->hang && left > 0 && !access(path, F_OK)) {
        sleep_ms(5);
        left -= 5;
    }
    if (f->delay_ms)
        sleep_ms(f->delay_ms);
    if (f->die)
        kill(getpid(), SIGKILL);
    if (f->once)
        unlink(path);
    return f->code && !f->done;
}

static int serve(const struct request *r, int *value)
{
    int rc = r->fault.code;
    if (struck(r)) {
        pthread_mutex_lock(&T.m);
    } else {
        pthread_mutex_lock(&T.m);
        switch (r->op) {
        case OP_STATE: *value = r->fault.answer ? r->fault.answer : T.state; rc = OK; break;
        case OP_LOCK: rc = do_lock(r->timeout_ms); break;
        case OP_CHECKPOINT: rc = do_checkpoint(); break;
        case OP_RESTORE: rc = do_restore(r); break;
        case OP_UNLOCK: rc = do_unlock(); break;
        default: rc = INVALID_VALUE;
        }
        if (r->fault.code)
            rc = r->fault.code;
    }
    if (r->fault.failed)
        T.state = FAILED;
    pthread_mutex_unlock(&T.m);
    return rc;
}

static void tell(unsigned op, int rc)
{
    char path[300], line[64];
    snprintf(path, sizeof path, "%s/calls", root());
    int fd = op == OP_STATE || op == OP_TID ? -1 : open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
    if (fd < 0)
        return;
    int n = snprintf(line, sizeof line, "%d %s %d\n", getpid(), op_names[op], rc);
    if (write(fd, line, n) != n)
        abort();
    close(fd);
}

/* The restore thread. Its comm carries the two descriptors, so that a controller finds them. */
static void *restore_thread(void *unused)
{
    char name[16], path[64];
    struct request r;
    (void)unused;
    snprintf(name, sizeof name, "cuda%03x%03x", T.reqfd & 0xfff, T.rspfd & 0xfff);
    pthread_setname_np(pthread_self(), name);
    pthread_mutex_lock(&T.m);
    T.inited = 1;
    pthread_cond_broadcast(&T.c);
    pthread_mutex_unlock(&T.m);
    for (;;) {
        ssize_t k = read(T.reqfd, &r, sizeof r);
        if (k < 0 && errno == EINTR)
            continue;
        if (k != sizeof r)
            return 0;
        struct response s = { r.seq, OK, 0 };
        s.rc = serve(&r, &s.value);
        tell(r.op, s.rc);
        snprintf(path, sizeof path, "/proc/self/fd/%d", T.rspfd);
        int w = open(path, O_WRONLY | O_CLOEXEC);
        if (w >= 0) {
            if (write(w, &s, sizeof s) != sizeof s)
                abort();
            close(w);
        }
    }
}

/* CUDA_VISIBLE_DEVICES: what comes after the first entry that is no GPU is not seen, as documented */
static void look(const struct gpu *g, int n)
{
    char list[1024], *save = 0;
    const char *v = getenv("CUDA_VISIBLE_DEVICES");
    if (!v) {
        for (T.ng = 0; T.ng < n; T.ng++)
            strcpy(T.g[T.ng].uuid, g[T.ng].uuid);
    } else {
        snprintf(list, sizeof list, "%s", v);
        for (char *s = strtok_r(list, ",", &save); s && T.ng < MAX_GPUS; s = strtok_r(0, ",", &save)) {
            const struct gpu *it = isdigit((unsigned char)*s) ? (atoi(s) < n ? g + atoi(s) : 0) : find_gpu(g, n, s);
            if (!it)
                break;
            strcpy(T.g[T.ng++].uuid, it->uuid);
        }
    }
    for (int i = 0; i < T.ng; i++)
        T.g[i].ledger = -1;
}

int cuInit(unsigned flags)
{
    struct gpu g[MAX_GPUS];
    int n = list_gpus(g, MAX_GPUS), p[2], rc = OK;
    const char *leftover = getenv("FAKE_CUDA_LEFTOVER");
    pthread_t th;
    if (flags)
        return INVALID_VALUE;
    if (n < 1)
        return NO_DEVICE;
    pthread_mutex_lock(&T.m);
    if (T.inited && T.owner != getpid()) {
        rc = NOT_INITIALIZED; /* CUDA does not survive a fork */
    } else if (!T.inited) {
        T.owner = getpid();
        T.ng = 0;
        look(g, n);
        if (!T.ng)
            rc = NO_DEVICE;
        else if ((T.devfd = open_device(T.g[0].uuid)) < 0 || pipe2(p, O_CLOEXEC))
            rc = OPERATING_SYSTEM;
        if (!rc) {
            T.reqfd = move_up(p[0]);
            move_up(p[1]); /* the write ends stay open in the target, so that reads block */
            if (pipe2(p, O_CLOEXEC))
                rc = OPERATING_SYSTEM;
        }
        if (!rc) {
            T.rspfd = move_up(p[0]);
            move_up(p[1]);
            if (leftover && !strcmp(leftover, "fd"))
                T.extrafd = open_device(T.g[0].uuid);
            T.next = 0x300000000ull;
            if (pthread_create(&th, 0, restore_thread, 0))
                rc = OPERATING_SYSTEM;
            while (!rc && !T.inited)
                pthread_cond_wait(&T.c, &T.m);
        }
    }
    pthread_mutex_unlock(&T.m);
    return rc;
}

/* every ordinary API call passes here: it blocks while the process is not RUNNING. Holds T.m on success */
static int enter(void)
{
    pthread_mutex_lock(&T.m);
    if (!T.inited || T.owner != getpid()) {
        pthread_mutex_unlock(&T.m);
        return NOT_INITIALIZED;
    }
    while (T.state != RUNNING || T.draining)
        pthread_cond_wait(&T.c, &T.m);
    T.in_api++;
    return OK;
}

static int leave(int rc)
{
    T.in_api--;
    pthread_cond_broadcast(&T.c);
    pthread_mutex_unlock(&T.m);
    return rc;
}

/* the default stream: copies wait for the kernels before them */
static void synchronize(void)
{
    while (T.in_flight)
        pthread_cond_wait(&T.c, &T.m);
}

int cuDeviceGetCount(int *n)
{
    int rc = enter();
    if (rc)
        return rc;
    *n = T.ng;
    return leave(OK);
}

int cuDeviceGet(int *device, int ordinal)
{
    int rc = enter();
    if (rc)
        return rc;
    *device = ordinal;
    return leave(ordinal < 0 || ordinal >= T.ng ? INVALID_DEVICE : OK);
}

int cuDeviceGetUuid_v2(char *uuid, int i)
{
    int rc = enter();
    if (rc)
        return rc;
    if (i < 0 || i >= T.ng)
        return leave(INVALID_DEVICE);
    uuid_to_bytes(T.g[i].uuid, uuid);
    return leave(OK);
}

int cuDeviceTotalMem_v2(size_t *bytes, int i)
{
    struct gpu g[MAX_GPUS];
    int n = list_gpus(g, MAX_GPUS), rc = enter();
    if (rc)
        return rc;
    const struct gpu *it = i < 0 || i >= T.ng ? 0 : find_gpu(g, n, T.g[i].uuid);
    if (it)
        *bytes = it->total;
    return leave(it ? OK : INVALID_DEVICE);
}

/* With T.m held: take more of this thread's GPU, a context or `bytes`; OUT_OF_MEMORY where there is no room. */
static int take(int gpu, long bytes)
{
    struct gpu g[MAX_GPUS];
    int n = list_gpus(g, MAX_GPUS), rc = OK, machine = lock_file("machine");
    const struct gpu *it = find_gpu(g, n, T.g[gpu].uuid);
    if (!it || used_bytes(it->uuid) + (bytes ? bytes : CONTEXT_BYTES) > it->total) {
        rc = OUT_OF_MEMORY;
    } else if (!bytes) {
        T.g[gpu].context = 1;
        account();
    } else {
        struct alloc *a = &T.a[T.na];
        *a = (struct alloc){ .dptr = T.next, .size = bytes, .gpu = gpu, .dev = map_device(bytes) };
        if (a->dev) {
            T.na++;
            T.next += (bytes + 0xfffff) & ~0xfffffull;
            account();
        } else {
            rc = OUT_OF_MEMORY;
        }
    }
    close(machine);
    return rc;
}

int cuDevicePrimaryCtxRetain(void **ctx, int device)
{
    int rc = enter();
    if (rc)
        return rc;
    if (device < 0 || device >= T.ng)
        return leave(INVALID_DEVICE);
    rc = T.g[device].context ? OK : take(device, 0);
    *ctx = (void *)(intptr_t)(0x1000 + device);
    return leave(rc);
}

int cuCtxSetCurrent(void *ctx)
{
    int rc = enter();
    if (rc)
        return rc;
    int device = (int)(intptr_t)ctx - 0x1000;
    if (device < 0 || device >= T.ng || !T.g[device].context)
        return leave(INVALID_CONTEXT);
    current = device;
    return leave(OK);
}

int cuCtxSynchronize(void)
{
    int rc = enter();
    if (rc)
        return rc;
    synchronize();
    return leave(OK);
}

int cuMemAlloc_v2(uint64_t *out, size_t n)
{
    int rc = enter();
    if (rc)
        return rc;
    if (current < 0)
        return leave(INVALID_CONTEXT);
    if (!n)
        return leave(INVALID_VALUE);
    rc = T.na < MAX_ALLOCS ? take(current, n) : OUT_OF_MEMORY;
    if (!rc)
        *out = T.a[T.na - 1].dptr;
    return leave(rc);
}

int cuMemFree_v2(uint64_t dptr)
{
    int rc = enter();
    if (rc)
        return rc;
    rc = INVALID_VALUE;
    synchronize();
    for (int i = 0; i < T.na; i++)
        if (T.a[i].dptr == dptr) {
            munmap(T.a[i].dev, T.a[i].size);
            T.a[i] = T.a[--T.na];
            int machine = lock_file("machine");
            account();
            close(machine);
            rc = OK;
            break;
        }
    return leave(rc);
}

/* memory that both sides see: its address is the host's. A process that has any cannot be checkpointed */
int cuMemAllocManaged(uint64_t *out, size_t n, unsigned flags)
{
    (void)flags;
    int rc = cuMemAlloc_v2(out, n);
    if (rc)
        return rc;
    pthread_mutex_lock(&T.m);
    T.managed = 1;
    for (int i = 0; i < T.na; i++)
        if (T.a[i].dptr == *out)
            *out = T.a[i].dptr = (uint64_t)(uintptr_t)T.a[i].dev;
    pthread_mutex_unlock(&T.m);
    return OK;
}

int cuIpcGetMemHandle(char *handle /* 64 bytes */, uint64_t dptr)
{
    int rc = enter();
    if (rc)
        return rc;
    memset(handle, 0, 64);
    memcpy(handle, &dptr, sizeof dptr);
    T.ipc = 1;
    return leave(OK);
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
    struct gpu g[MAX_GPUS];
    int n = list_gpus(g, MAX_GPUS), rc = enter();
    if (rc)
        return rc;
    if (current < 0)
        return leave(INVALID_CONTEXT);
    int machine = lock_file("machine");
    const struct gpu *it = find_gpu(g, n, T.g[current].uuid);
    if (it) {
        *total = it->total;
        *free_bytes = it->total - used_bytes(it->uuid);
    }
    close(machine);
    return leave(it ? OK : INVALID_DEVICE);
}

static char *find_device_bytes(uint64_t d, size_t n)
{
    for (int i = 0; i < T.na; i++)
        if (T.a[i].dev && d >= T.a[i].dptr && d + n <= T.a[i].dptr + T.a[i].size)
            return T.a[i].dev + (d - T.a[i].dptr);
    return 0;
}

int cuMemcpyHtoD_v2(uint64_t dst, const void *src, size_t n)
{
    int rc = enter();
    if (rc)
        return rc;
    synchronize();
    char *p = find_device_bytes(dst, n);
    if (p)
        memcpy(p, src, n);
    return leave(p ? OK : INVALID_VALUE);
}

int cuMemcpyDtoH_v2(void *dst, uint64_t src, size_t n)
{
    int rc = enter();
    if (rc)
        return rc;
    synchronize();
    char *p = find_device_bytes(src, n);
    if (p)
        memcpy(dst, p, n);
    return leave(p ? OK : INVALID_VALUE);
}

int cuModuleLoadData(void **module, const void *image)
{
    int rc = enter();
    if (rc)
        return rc;
    *module = (void *)image;
    return leave(current < 0 ? INVALID_CONTEXT : OK);
}

int cuModuleGetFunction(void **function, void *module, const char *name)
{
    int rc = enter();
    if (rc)
        return rc;
    *function = module;
    return leave(strstr(module, name) ? OK : NOT_FOUND);
}

static void *busy_kernel(void *ns)
{
    sleep_ms((intptr_t)ns / 1e6);
    pthread_mutex_lock(&T.m);
    T.in_flight--;
    pthread_cond_broadcast(&T.c);
    pthread_mutex_unlock(&T.m);
    return 0;
}

/* every kernel here does one thing: it spins for as many nanoseconds as its first argument (u64) says, and cannot be interrupted */
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream,
                   void **params, void **extra)
{
    pthread_t t;
    int rc = enter();
    if (rc)
        return rc;
    (void)shared, (void)stream, (void)extra;
    if (!f || !params || !gx || !gy || !gz || !bx || !by || !bz)
        return leave(INVALID_VALUE);
    T.in_flight++;
    if (pthread_create(&t, 0, busy_kernel, (void *)(intptr_t) * (uint64_t *)params[0]))
        abort();
    pthread_detach(t);
    return leave(OK);
}

int cuDriverGetVersion(int *v)
{
    const char *e = getenv("FAKE_CUDA_VERSION");
    *v = e && *e ? atoi(e) : version();
    return OK;
}

/* ------------------------------------------------------------------ controller side */

/*
 * What is armed for this call: faults/<pid>/<call>, else faults/any/<call>. Words of the file:
 *   hang      the target does not answer until the file is removed, or FAKE_CUDA_HANG_LIMIT has passed; then the other words count
 *   <n>ms     it answers so much later
 *   die       it is killed (SIGKILL) before it answers
 *   <code>    it answers that CUresult, and nothing is done
 *   done      with a code: it is done all the same
 *   failed    the process is FAILED from then on
 *   state=<n> get-state answers that one
 *   once      the file is removed when it strikes
 */
static struct fault faults_of(int pid, int op)
{
    struct fault f = { 0 };
    char path[400], word[32];
    unsigned ms;
    int at;
    FILE *file = 0;
    for (int any = 0; !file && any < 2; any++) {
        snprintf(f.who, sizeof f.who, any ? "any" : "%d", pid);
        snprintf(path, sizeof path, "%s/faults/%s/%s", root(), f.who, op_names[op]);
        file = fopen(path, "re");
    }
    if (!file)
        return f;
    while (fscanf(file, "%31s", word) == 1) {
        at = 0;
        if (!strcmp(word, "hang"))
            f.hang = 1;
        else if (!strcmp(word, "die"))
            f.die = 1;
        else if (!strcmp(word, "failed"))
            f.failed = 1;
        else if (!strcmp(word, "done"))
            f.done = 1;
        else if (!strcmp(word, "once"))
            f.once = 1;
        else if (sscanf(word, "state=%d", &f.answer) == 1)
            continue;
        else if (sscanf(word, "%ums%n", &ms, &at) == 1 && at == (int)strlen(word))
            f.delay_ms = ms;
        else if (isdigit((unsigned char)*word))
            f.code = atoi(word);
        else {
            fprintf(stderr, "fakecuda: %s: %s is no fault\n", path, word);
            abort();
        }
    }
    fclose(file);
    return f;
}

/* find the target's restore thread and its descriptors by the thread's name */
static int find_target(int pid, int *reqfd, int *rspfd, int *tid)
{
    char dir[64];
    struct dirent *e;
    int hit = 0;
    snprintf(dir, sizeof dir, "/proc/%d/task", pid);
    DIR *d = opendir(dir);
    if (!d)
        return errno == EACCES ? OPERATING_SYSTEM : INVALID_VALUE;
    while (!hit && (e = readdir(d))) {
        char file[400], name[32] = "";
        unsigned a, b;
        if (e->d_name[0] == '.')
            continue;
        snprintf(file, sizeof file, "%s/%s/comm", dir, e->d_name);
        FILE *f = fopen(file, "re");
        if (!f)
            continue;
        if (fgets(name, sizeof name, f) && strlen(name) == 11 && sscanf(name, "cuda%3x%3x", &a, &b) == 2) {
            *reqfd = a;
            *rspfd = b;
            *tid = atoi(e->d_name);
            hit = 1;
        }
        fclose(f);
    }
    closedir(d);
    return hit ? OK : NOT_INITIALIZED;
}

/* Wait for the answer to request `seq`, without a limit: a stopped target means a blocked caller. One that died means 304, a guess. */
static int answer(int rd, int pidfd, uint32_t seq, int *value)
{
    struct response s;
    for (;;) {
        struct pollfd p[2] = { { rd, POLLIN, 0 }, { pidfd, POLLIN, 0 } };
        if (poll(p, 2, -1) < 0) {
            if (errno == EINTR)
                continue;
            return OPERATING_SYSTEM;
        }
        if (!(p[0].revents & POLLIN))
            return OPERATING_SYSTEM;
        if (read(rd, &s, sizeof s) != sizeof s)
            return OPERATING_SYSTEM;
        if (s.seq == seq) { /* older answers: their caller died, drop them */
            if (value)
                *value = s.value;
            return s.rc;
        }
    }
}

static int call(int pid, struct request *r, int *value)
{
    static uint32_t counter;
    char path[400];
    int reqfd, rspfd, tid, rc;
    if (!has_checkpoint_api())
        return NOT_SUPPORTED;
    if (pid <= 0)
        return INVALID_VALUE;
    if ((rc = find_target(pid, &reqfd, &rspfd, &tid)))
        return rc;
    if (r->op == OP_TID) { /* a tid of the caller's pid namespace */
        *value = tid;
        return OK;
    }
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, reqfd);
    int w = open(path, O_RDWR | O_CLOEXEC); /* RDWR: no SIGPIPE if the target dies meanwhile */
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, rspfd);
    int rd = open(path, O_RDONLY | O_CLOEXEC);
    int pidfd = syscall(SYS_pidfd_open, pid, 0); /* -1 for a thread's id: then only the pipe tells */
    snprintf(path, sizeof path, "%d", pid);
    int lock = lock_file(path);
    rc = OPERATING_SYSTEM;
    if (w >= 0 && rd >= 0 && lock >= 0) {
        r->fault = faults_of(pid, r->op);
        r->seq = (uint32_t)getpid() << 12 ^ __atomic_add_fetch(&counter, 1, __ATOMIC_SEQ_CST);
        if (write(w, r, sizeof *r) == sizeof *r)
            rc = answer(rd, pidfd, r->seq, value);
    }
    for (unsigned i = 0; i < 4; i++) {
        int fd = (int[]){ lock, w, rd, pidfd }[i];
        if (fd >= 0)
            close(fd);
    }
    return rc;
}

/* reserved words of a 64-byte argument struct have to be zero */
static int zero_from(const void *args, unsigned first_byte)
{
    for (unsigned i = first_byte; args && i < 64; i++)
        if (((const char *)args)[i])
            return 0;
    return 1;
}

int cuCheckpointProcessGetState(int pid, int *state)
{
    struct request r = { .op = OP_STATE };
    return call(pid, &r, state);
}

int cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
    struct request r = { .op = OP_TID };
    return call(pid, &r, tid);
}

int cuCheckpointProcessLock(int pid, unsigned *args) /* { timeoutMs, reserved } */
{
    struct request r = { .op = OP_LOCK, .timeout_ms = args ? args[0] : 0 };
    return zero_from(args, 4) ? call(pid, &r, 0) : INVALID_VALUE;
}

int cuCheckpointProcessCheckpoint(int pid, void *args)
{
    struct request r = { .op = OP_CHECKPOINT };
    return zero_from(args, 0) ? call(pid, &r, 0) : INVALID_VALUE; /* custom storage (r615) is not here */
}

struct restore_args { struct pair *pairs; unsigned count; };

int cuCheckpointProcessRestore(int pid, struct restore_args *args)
{
    struct request r = { .op = OP_RESTORE };
    if (!zero_from(args, has_remap() ? 12 : 0))
        return INVALID_VALUE;
    if (args && args->count) {
        if (args->count > MAX_PAIRS || !args->pairs)
            return INVALID_VALUE;
        r.npairs = args->count;
        memcpy(r.pairs, args->pairs, args->count * sizeof *args->pairs);
    }
    return call(pid, &r, 0);
}

int cuCheckpointProcessUnlock(int pid, void *args)
{
    struct request r = { .op = OP_UNLOCK };
    return zero_from(args, 0) ? call(pid, &r, 0) : INVALID_VALUE;
}

/* ------------------------------------------------------------------ look-up */

int cuGetErrorName(int e, const char **p)
{
    static const struct { int code; const char *name; } names[] = {
        { OK, "CUDA_SUCCESS" }, { INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE" }, { OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY" },
        { NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED" }, { NO_DEVICE, "CUDA_ERROR_NO_DEVICE" },
        { INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE" }, { INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT" },
        { OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM" }, { ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE" },
        { NOT_FOUND, "CUDA_ERROR_NOT_FOUND" }, { NOT_READY, "CUDA_ERROR_NOT_READY" }, { NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED" },
        { NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED" }, { UNKNOWN, "CUDA_ERROR_UNKNOWN" } };
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == e) {
            *p = names[i].name;
            return OK;
        }
    *p = 0;
    return INVALID_VALUE;
}

int cuGetErrorString(int e, const char **p) { return cuGetErrorName(e, p); }

/* The bindings dlsym() only this one, and ask it for everything else (about 500 names). */
int cuGetProcAddress_v2(const char *name, void **fn, int wanted, uint64_t flags, int *status)
{
#define SYM(n) { #n, n, 0 }
#define NEW(n) { #n, n, 12080 } /* not before that version */
    static const struct { const char *name; void *fn; int since; } table[] = {
        SYM(cuInit), SYM(cuDriverGetVersion), SYM(cuDeviceGetCount), SYM(cuDeviceGet), SYM(cuGetErrorName), SYM(cuGetErrorString),
        SYM(cuDevicePrimaryCtxRetain), SYM(cuCtxSetCurrent), SYM(cuCtxSynchronize), SYM(cuMemAllocManaged), SYM(cuIpcGetMemHandle),
        SYM(cuModuleLoadData), SYM(cuModuleGetFunction), SYM(cuLaunchKernel), { "cuGetProcAddress", cuGetProcAddress_v2, 0 },
        { "cuMemAlloc", cuMemAlloc_v2, 0 }, { "cuMemFree", cuMemFree_v2, 0 }, { "cuMemGetInfo", cuMemGetInfo_v2, 0 },
        { "cuMemcpyHtoD", cuMemcpyHtoD_v2, 0 }, { "cuMemcpyDtoH", cuMemcpyDtoH_v2, 0 }, { "cuDeviceGetUuid", cuDeviceGetUuid_v2, 0 },
        { "cuDeviceTotalMem", cuDeviceTotalMem_v2, 0 },
        NEW(cuCheckpointProcessGetState), NEW(cuCheckpointProcessGetRestoreThreadId), NEW(cuCheckpointProcessLock),
        NEW(cuCheckpointProcessCheckpoint), NEW(cuCheckpointProcessRestore), NEW(cuCheckpointProcessUnlock) };
    (void)flags;
    *fn = 0;
    for (unsigned i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(table[i].name, name) && table[i].since <= version()) {
            if (wanted >= table[i].since)
                *fn = table[i].fn;
            if (status)
                *status = *fn ? 0 : 2; /* 2: the caller's version is not sufficient */
            return *fn ? OK : NOT_FOUND;
        }
    if (status)
        *status = 1; /* not found */
    return NOT_FOUND;
}
