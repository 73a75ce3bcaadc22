/*
 * fakenvml.c - test double of libnvidia-ml.so.1 for nvidia-ml-py (module pynvml). Never taken from our own code: a test of ours that
 * passes here says nothing about NVIDIA's library. Build: gcc -shared -fPIC -Wl,-soname,libnvidia-ml.so.1.
 *
 * Everything is read from FAKE_CUDA_ROOT (default /dev/shm/fakecuda) at every call, so that a test can change it at any time:
 *   devices                 "<uuid> <bytes>" for each GPU; without this file the driver is not loaded. A slice (MIG-) has no index here
 *   <uuid>/<pid>            bytes that this process holds (fakecuda.c writes it), locked while it lives; else it does not count
 *   nvml/driver, nvml/cuda  "580.159.04", "13000"
 *   nvml/errors             "<function> <code>" for each function that fails; "hang" for a code waits until the line is gone
 *   nvml/<uuid>/<field>     name, compute, mig, pending_mig, persistence, mode, ecc, rows ("corrected uncorrected pending failed"),
 *                           bus, minor, reserved (bytes), mps (pids, a line each); "n/a" is answered with "not supported"
 * FAKE_DRIVER_VERSION is the version where nvml/driver is not there. Built with -DFAKE_NVML_RELEASE=<major>, functions that came later
 * are absent, as in an older library: remapped rows and MIG (450), the third version of the lists of processes (510).
 * Processes are listed by their pids in the pid namespace of who asks. Guesses: one that has none there is not listed; used memory is that
 * of processes, and `reserved`.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef FAKE_NVML_RELEASE
#define FAKE_NVML_RELEASE 580
#endif

enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9, FUNCTION_NOT_FOUND = 13, LIB_RM_VERSION_MISMATCH = 18, UNKNOWN = 999
};
#define NOT_AVAILABLE 0xffffffffu

typedef unsigned long long u64;
typedef struct { char uuid[80]; u64 total; } gpu;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } process_info;
typedef struct {
    char legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char id[32];
} pci_info;

static gpu gpus[64];
static unsigned ngpus;
static int open_count;

/* --- what a test has written ------------------------------------------------------------------------------------------------- */

typedef struct { char text[2048]; } path;

static path path_of(const char *name)
{
    path p;
    const char *root = getenv("FAKE_CUDA_ROOT");
    snprintf(p.text, sizeof p.text, "%s/%s", root ? root : "/dev/shm/fakecuda", name);
    return p;
}

static FILE *open_file(const char *name)
{
    path p = path_of(name);
    return fopen(p.text, "re");
}

/* The first line of a file, or `otherwise`. */
static void line_of(const char *name, const char *otherwise, char *buf, size_t len)
{
    FILE *f = open_file(name);
    if (!f || !fgets(buf, (int)len, f))
        snprintf(buf, len, "%s", otherwise);
    if (f)
        fclose(f);
    buf[strcspn(buf, "\n")] = 0;
}

static int field(gpu *h, const char *name, const char *otherwise, char *buf, size_t len)
{
    char path[200];
    snprintf(path, sizeof path, "nvml/%s/%s", h->uuid, name);
    line_of(path, otherwise, buf, len);
    return strcmp(buf, "n/a") ? OK : NOT_SUPPORTED;
}

static int number(gpu *h, const char *name, const char *otherwise, u64 *value)
{
    char text[100];
    int rc = field(h, name, otherwise, text, sizeof text);
    *value = rc ? 0 : strtoull(text, 0, 0);
    return rc;
}

static int said_of(const char *function, char *code)
{
    char name[100];
    FILE *f = open_file("nvml/errors");
    int found = 0;
    while (f && !found && fscanf(f, "%99s %19s", name, code) == 2)
        found = !strcmp(name, function);
    if (f)
        fclose(f);
    return found;
}

static int fault(const char *function)
{
    char code[20];
    while (said_of(function, code)) {
        if (strcmp(code, "hang"))
            return atoi(code);
        usleep(5000);
    }
    return OK;
}

/* What every function of NVML does first. */
#define ENTER                                                                                                                        \
    do {                                                                                                                             \
        int rc_ = fault(__func__);                                                                                                   \
        if (rc_)                                                                                                                     \
            return rc_;                                                                                                              \
        if (!open_count)                                                                                                             \
            return UNINITIALIZED;                                                                                                    \
    } while (0)

static int put(const char *text, char *buf, unsigned len)
{
    if (strlen(text) >= len)
        return INSUFFICIENT_SIZE;
    strcpy(buf, text);
    return OK;
}

/* --- the library ------------------------------------------------------------------------------------------------------------- */

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    int rc = fault(__func__);
    if (rc)
        return rc;
    FILE *f = open_file("devices");
    if (!f)
        return DRIVER_NOT_LOADED;
    for (ngpus = 0; ngpus < 64 && fscanf(f, "%79s %llu", gpus[ngpus].uuid, &gpus[ngpus].total) == 2;)
        ngpus += strncmp(gpus[ngpus].uuid, "MIG-", 4) != 0;
    fclose(f);
    open_count++;
    return OK;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void)
{
    ENTER;
    open_count--;
    return OK;
}

const char *nvmlErrorString(int e)
{
    switch (e) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case FUNCTION_NOT_FOUND: return "Function Not Found";
    case LIB_RM_VERSION_MISMATCH: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *buf, unsigned len)
{
    ENTER;
    char text[100];
    const char *v = getenv("FAKE_DRIVER_VERSION");
    line_of("nvml/driver", v ? v : "580.159.04", text, sizeof text);
    return put(text, buf, len);
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    ENTER;
    char text[100];
    line_of("nvml/cuda", "13000", text, sizeof text);
    *version = atoi(text);
    return OK;
}

int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

/* --- one GPU ----------------------------------------------------------------------------------------------------------------- */

int nvmlDeviceGetCount_v2(unsigned *n)
{
    ENTER;
    *n = ngpus;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned i, gpu **h)
{
    ENTER;
    if (i >= ngpus)
        return INVALID_ARGUMENT;
    *h = &gpus[i];
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, gpu **h)
{
    ENTER;
    for (unsigned i = 0; i < ngpus; i++)
        if (!strcmp(uuid, gpus[i].uuid)) {
            *h = &gpus[i];
            return OK;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(gpu *h, char *buf, unsigned len)
{
    ENTER;
    return put(h->uuid, buf, len);
}

int nvmlDeviceGetName(gpu *h, char *buf, unsigned len)
{
    ENTER;
    char text[400];
    int rc = field(h, "name", "Fake GPU", text, sizeof text);
    return rc ? rc : put(text, buf, len);
}

int nvmlDeviceGetMinorNumber(gpu *h, unsigned *minor)
{
    ENTER;
    char own[20];
    u64 v;
    snprintf(own, sizeof own, "%d", (int)(h - gpus));
    int rc = number(h, "minor", own, &v);
    *minor = (unsigned)v;
    return rc;
}

int nvmlDeviceGetPciInfo_v3(gpu *h, pci_info *p)
{
    ENTER;
    char own[32], text[32];
    snprintf(own, sizeof own, "00000000:%02X:00.0", (int)(h - gpus) + 1);
    int rc = field(h, "bus", own, text, sizeof text);
    if (rc)
        return rc;
    memset(p, 0, sizeof *p);
    memcpy(p->id, text, sizeof p->id);
    snprintf(p->legacy, sizeof p->legacy, "%.12s", strlen(text) > 12 ? text + 4 : text);
    sscanf(text, "%x:%x:%x", &p->domain, &p->bus, &p->device);
    p->device_id = 0x233010de;
    return OK;
}

int nvmlDeviceGetCudaComputeCapability(gpu *h, int *major, int *minor)
{
    ENTER;
    char text[40];
    int rc = field(h, "compute", "9.0", text, sizeof text);
    if (!rc && sscanf(text, "%d.%d", major, minor) != 2)
        return UNKNOWN;
    return rc;
}

int nvmlDeviceGetComputeMode(gpu *h, unsigned *mode)
{
    ENTER;
    u64 v;
    int rc = number(h, "mode", "0", &v);
    *mode = (unsigned)v;
    return rc;
}

int nvmlDeviceGetPersistenceMode(gpu *h, unsigned *mode)
{
    ENTER;
    u64 v;
    int rc = number(h, "persistence", "1", &v);
    *mode = (unsigned)v;
    return rc;
}

int nvmlDeviceGetTotalEccErrors(gpu *h, unsigned type, unsigned counter, u64 *errors)
{
    ENTER;
    if (type > 1 || counter > 1)
        return INVALID_ARGUMENT;
    int rc = number(h, "ecc", "0", errors);
    if (!rc && type == 0) /* corrected ones are not kept */
        *errors = 0;
    return rc;
}

/* --- its memory and its processes -------------------------------------------------------------------------------------------- */

/* What fakecuda.c takes when it reads or writes a ledger; -1 if it cannot be had. */
static int lock_machine(void)
{
    path locks = path_of("locks"), machine = path_of("locks/machine");
    mkdir(locks.text, 0777);
    int fd = open(machine.text, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd >= 0)
        flock(fd, LOCK_EX);
    return fd;
}

/* Of who calls himself `pid` in the pid namespace with that inode, here; 0: nobody */
static unsigned pid_here(unsigned pid, u64 namespace)
{
    struct dirent *e;
    unsigned found = 0;
    DIR *d = opendir("/proc");
    while (d && !found && (e = readdir(d))) {
        char name[300], text[300] = "";
        snprintf(name, sizeof name, "/proc/%s/ns/pid", e->d_name);
        if (readlink(name, text, sizeof text - 1) < 0 || strtoull(text + strlen("pid:["), 0, 10) != namespace)
            continue;
        snprintf(name, sizeof name, "/proc/%s/status", e->d_name);
        FILE *f = fopen(name, "re");
        while (f && fgets(text, sizeof text, f))
            if (!strncmp(text, "NSpid:", 6) && (unsigned)atoi(strrchr(text, '\t') + 1) == pid) /* the last is its own */
                found = (unsigned)atoi(e->d_name);
        if (f)
            fclose(f);
    }
    if (d)
        closedir(d);
    return found;
}

/* `who` is the name of a ledger */
static void list(process_info *out, unsigned max, unsigned *n, const char *who, u64 used)
{
    const char *namespace = strchr(who, '@');
    unsigned pid = (unsigned)atoi(who);
    if (namespace && !(pid = pid_here(pid, strtoull(namespace + 1, 0, 10))))
        return;
    if (out && *n < max)
        out[*n] = (process_info){ pid, used, NOT_AVAILABLE, NOT_AVAILABLE };
    (*n)++;
}

static unsigned scan(gpu *h, process_info *out, unsigned max, u64 *sum)
{
    unsigned n = 0;
    struct dirent *e;
    *sum = 0;
    int machine = lock_machine();
    path folder = path_of(h->uuid);
    DIR *d = opendir(folder.text);
    while (d && (e = readdir(d))) {
        char text[40];
        if (e->d_name[0] == '.')
            continue;
        int fd = openat(dirfd(d), e->d_name, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        if (flock(fd, LOCK_SH | LOCK_NB)) { /* who wrote it lives */
            ssize_t k = read(fd, text, sizeof text - 1);
            text[k < 0 ? 0 : k] = 0;
            u64 used = strtoull(text, 0, 10);
            *sum += used;
            list(out, max, &n, e->d_name, used);
        }
        close(fd);
    }
    if (d)
        closedir(d);
    if (machine >= 0)
        close(machine);
    return n;
}

int nvmlDeviceGetMemoryInfo(gpu *h, u64 *m) /* { total, free, used } */
{
    ENTER;
    u64 used, reserved;
    int rc = number(h, "reserved", "0", &reserved);
    if (rc)
        return rc;
    scan(h, 0, 0, &used);
    used += reserved;
    m[0] = h->total;
    m[1] = used < h->total ? h->total - used : 0;
    m[2] = used;
    return OK;
}

#if FAKE_NVML_RELEASE >= 510
static int filled(unsigned n, unsigned *count, process_info *out)
{
    int rc = n > *count || (!out && n) ? INSUFFICIENT_SIZE : OK;
    *count = n;
    return rc;
}

int nvmlDeviceGetComputeRunningProcesses_v3(gpu *h, unsigned *count, process_info *out)
{
    ENTER;
    u64 sum;
    return filled(scan(h, out, *count, &sum), count, out);
}

int nvmlDeviceGetMPSComputeRunningProcesses_v3(gpu *h, unsigned *count, process_info *out)
{
    ENTER;
    char path[200], pid[40];
    unsigned n = 0;
    snprintf(path, sizeof path, "nvml/%s/mps", h->uuid);
    FILE *f = open_file(path);
    while (f && fscanf(f, "%39s", pid) == 1)
        list(out, *count, &n, pid, 0);
    if (f)
        fclose(f);
    return filled(n, count, out);
}
#endif

#if FAKE_NVML_RELEASE >= 450
int nvmlDeviceGetMigMode(gpu *h, unsigned *current, unsigned *pending)
{
    ENTER;
    u64 now, next;
    int rc = number(h, "mig", "0", &now);
    if (rc)
        return rc;
    *current = *pending = (unsigned)now;
    if (!number(h, "pending_mig", now ? "1" : "0", &next))
        *pending = (unsigned)next;
    return OK;
}

int nvmlDeviceGetRemappedRows(gpu *h, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed)
{
    ENTER;
    char text[100];
    int rc = field(h, "rows", "0 0 0 0", text, sizeof text);
    if (!rc && sscanf(text, "%u %u %u %u", corrected, uncorrected, pending, failed) != 4)
        return UNKNOWN;
    return rc;
}
#endif
