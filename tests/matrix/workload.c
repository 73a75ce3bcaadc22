/* The workload of the crash matrix: a root with a second thread, and a child; each holds memory that must not change, counts, and says so
 * in its own slot of a file of fixed length:
 *
 *     <token> <counter> <wrong words> <turns of the thread> <pid>\n      in 96 bytes, padded with spaces
 *
 * Eight beats compare all of the memory. Arguments: the file, MiB of the root, microseconds between beats; and `alone`, if there is to be
 * no child.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

enum { SLOT = 96, PARTS = 8 };

static volatile uint64_t in_thread;

static uint64_t word(uint64_t token, uint64_t i)
{
	uint64_t x = token + i * 0x9e3779b97f4a7c15ull;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	return x ^ (x >> 31);
}

static void *second(void *interval)
{
	for (;;) {
		in_thread++;
		usleep(*(useconds_t *)interval);
	}
	return NULL;
}

static void count(int file, int slot, uint64_t token, size_t bytes, useconds_t interval)
{
	size_t n = bytes / sizeof(uint64_t), part = n / PARTS;
	uint64_t *held = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t counter = 0, wrong = 0;
	char line[SLOT + 1];

	if (held == MAP_FAILED)
		exit(3);
	for (size_t i = 0; i < n; i++)
		held[i] = word(token, i);
	for (;;) {
		size_t from = counter % PARTS * part;
		for (size_t i = from; i < from + part; i++)
			wrong += held[i] != word(token, i);
		counter++;
		int used = snprintf(line, sizeof line, "%016llx %llu %llu %llu %d", (unsigned long long)token,
				    (unsigned long long)counter, (unsigned long long)wrong,
				    (unsigned long long)in_thread, getpid());
		memset(line + used, ' ', SLOT - used);
		line[SLOT - 1] = '\n';
		if (pwrite(file, line, SLOT, (off_t)slot * SLOT) != SLOT)
			exit(4);
		usleep(interval);
	}
}

int main(int argc, char **argv)
{
	uint64_t tokens[2];
	pthread_t thread;
	static useconds_t interval;
	int file;

	if (argc < 4 || (file = open(argv[1], O_WRONLY)) < 0 || getrandom(tokens, sizeof tokens, 0) != sizeof tokens)
		return 2;
	interval = atoi(argv[3]);
	if (argc == 4 && fork() == 0)
		count(file, 1, tokens[1], 1 << 20, interval);
	if (pthread_create(&thread, NULL, second, &interval))
		return 5;
	count(file, 0, tokens[0], (size_t)atoi(argv[2]) << 20, interval);
}
