// SPDX-License-Identifier: Apache-2.0
//
// floor is what a mount costs without Go and without safety: a file server in C that checks nothing and forgets nothing, either
// on the device itself or at the other end of a relay and a Unix socket. The benchmark measures it beside the real one.
//
// usage: floor server|relay DIR MOUNTPOINT
//        floor pingpong N
//
// pingpong sends 80 bytes, as many as a GETATTR has with its headers, to a child and back, N times, and says how much CPU time both used for each round trip, in µs.

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_DATA (1 << 20)
#define BUFFER (MAX_DATA + 8192)

static _Noreturn void die(const char *what)
{
	perror(what);
	exit(1);
}

// A node is an O_PATH descriptor, and its id is that plus 1: the root's is 1. The same file looked up twice is two nodes.
static int node_fd(uint64_t id) { return id == FUSE_ROOT_ID ? 3 : (int)id - 1; }

static void fill_attr(struct fuse_attr *a, const struct stat *st)
{
	*a = (struct fuse_attr){
		.ino = st->st_ino, .size = st->st_size, .blocks = st->st_blocks,
		.atime = st->st_atim.tv_sec, .mtime = st->st_mtim.tv_sec, .ctime = st->st_ctim.tv_sec,
		.atimensec = st->st_atim.tv_nsec, .mtimensec = st->st_mtim.tv_nsec, .ctimensec = st->st_ctim.tv_nsec,
		.mode = st->st_mode, .nlink = st->st_nlink, .uid = st->st_uid, .gid = st->st_gid,
		.rdev = st->st_rdev, .blksize = st->st_blksize,
	};
}

static int attr_of(int fd, struct fuse_attr_out *a)
{
	struct stat st;
	if (fstatat(fd, "", &st, AT_EMPTY_PATH) < 0)
		return -errno;
	*a = (struct fuse_attr_out){.attr_valid = 1};
	fill_attr(&a->attr, &st);
	return sizeof *a;
}

static int entry_of(int dir, const char *name, struct fuse_entry_out *e)
{
	int fd = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	struct stat st;
	if (fstatat(fd, "", &st, AT_EMPTY_PATH) < 0) {
		int e = -errno;
		close(fd);
		return e;
	}
	*e = (struct fuse_entry_out){.nodeid = fd + 1, .entry_valid = 1, .attr_valid = 1};
	fill_attr(&e->attr, &st);
	return sizeof *e;
}

static int reopen(int fd, int flags)
{
	char path[32];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	fd = open(path, flags | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

static int set_attr(int fd, const struct fuse_setattr_in *in, struct fuse_attr_out *out)
{
	char path[32];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	if (in->valid & FATTR_MODE && chmod(path, in->mode) < 0)
		return -errno;
	if (in->valid & (FATTR_UID | FATTR_GID) &&
	    fchownat(fd, "", in->valid & FATTR_UID ? in->uid : (uid_t)-1, in->valid & FATTR_GID ? in->gid : (gid_t)-1, AT_EMPTY_PATH) < 0)
		return -errno;
	if (in->valid & FATTR_SIZE && truncate(path, in->size) < 0)
		return -errno;
	if (in->valid & (FATTR_ATIME | FATTR_MTIME)) {
		struct timespec t[2] = {{in->atime, in->atimensec}, {in->mtime, in->mtimensec}};
		if (!(in->valid & FATTR_ATIME))
			t[0].tv_nsec = UTIME_OMIT;
		else if (in->valid & FATTR_ATIME_NOW)
			t[0].tv_nsec = UTIME_NOW;
		if (!(in->valid & FATTR_MTIME))
			t[1].tv_nsec = UTIME_OMIT;
		else if (in->valid & FATTR_MTIME_NOW)
			t[1].tv_nsec = UTIME_NOW;
		if (utimensat(AT_FDCWD, path, t, 0) < 0)
			return -errno;
	}
	return attr_of(fd, out);
}

struct dirent64_ {
	uint64_t ino;
	int64_t off;
	unsigned short reclen;
	unsigned char type;
	char name[];
};

static int read_dir(const struct fuse_read_in *in, char *out, int dir, int plus)
{
	static char buf[32768];
	int size = 0, fd = in->fh;
	if (lseek(fd, in->offset, SEEK_SET) < 0)
		return -errno;
	int n = syscall(SYS_getdents64, fd, buf, in->size < sizeof buf ? in->size : sizeof buf);
	if (n < 0)
		return -errno;
	for (int i = 0; i < n;) {
		struct dirent64_ *d = (void *)(buf + i);
		int len = strlen(d->name);
		int need = plus ? FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET_DIRENTPLUS + len) : FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + len);
		if (size + need > (int)in->size)
			break;
		memset(out + size, 0, need);
		struct fuse_dirent *e = (void *)(out + size);
		if (plus) {
			struct fuse_direntplus *p = (void *)e;
			e = &p->dirent;
			if (strcmp(d->name, ".") && strcmp(d->name, ".."))
				entry_of(dir, d->name, &p->entry_out);
		}
		*e = (struct fuse_dirent){.ino = d->ino, .off = d->off, .namelen = len, .type = d->type};
		memcpy(e->name, d->name, len);
		size += need;
		i += d->reclen;
	}
	return size;
}

// serve does what a request asks, writes what the reply carries to out, and returns its length or a negative errno; 1 << 30: no reply.
static int serve(const struct fuse_in_header *h, const char *in, char *out)
{
	int fd = node_fd(h->nodeid), n;
	switch (h->opcode) {
	case FUSE_INIT:
		*(struct fuse_init_out *)out = (struct fuse_init_out){
			.major = 7, .minor = 31, .max_readahead = MAX_DATA, .max_write = MAX_DATA, .max_pages = MAX_DATA / 4096,
			.max_background = 64, .congestion_threshold = 48, .time_gran = 1,
			.flags = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_AUTO_INVAL_DATA | FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO |
				 FUSE_ATOMIC_O_TRUNC | FUSE_PARALLEL_DIROPS | FUSE_ASYNC_DIO,
		};
		return sizeof(struct fuse_init_out);
	case FUSE_LOOKUP:
		return entry_of(fd, in, (void *)out);
	case FUSE_FORGET:
		close(fd);
		return 1 << 30;
	case FUSE_BATCH_FORGET: {
		const struct fuse_batch_forget_in *b = (void *)in;
		const struct fuse_forget_one *one = (void *)(b + 1);
		for (uint32_t i = 0; i < b->count; i++)
			close(node_fd(one[i].nodeid));
		return 1 << 30;
	}
	case FUSE_INTERRUPT:
		return 1 << 30;
	case FUSE_GETATTR:
		return attr_of(fd, (void *)out);
	case FUSE_SETATTR:
		return set_attr(fd, (void *)in, (void *)out);
	case FUSE_OPEN:
	case FUSE_OPENDIR:
		n = reopen(fd, ((struct fuse_open_in *)in)->flags & (O_ACCMODE | O_TRUNC | O_DIRECTORY));
		*(struct fuse_open_out *)out = (struct fuse_open_out){.fh = n};
		return n < 0 ? n : (int)sizeof(struct fuse_open_out);
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
		close(((struct fuse_release_in *)in)->fh);
		return 0;
	case FUSE_FLUSH:
		return 0;
	case FUSE_FSYNC:
		return fsync(((struct fuse_fsync_in *)in)->fh) < 0 ? -errno : 0;
	case FUSE_READ: {
		const struct fuse_read_in *r = (void *)in;
		n = pread(r->fh, out, r->size, r->offset);
		return n < 0 ? -errno : n;
	}
	case FUSE_WRITE: {
		const struct fuse_write_in *w = (void *)in;
		n = pwrite(w->fh, w + 1, w->size, w->offset);
		*(struct fuse_write_out *)out = (struct fuse_write_out){.size = n};
		return n < 0 ? -errno : (int)sizeof(struct fuse_write_out);
	}
	case FUSE_READDIR:
	case FUSE_READDIRPLUS:
		return read_dir((void *)in, out, fd, h->opcode == FUSE_READDIRPLUS);
	case FUSE_CREATE: {
		const struct fuse_create_in *c = (void *)in;
		int f = openat(fd, (char *)(c + 1), c->flags | O_CREAT | O_NOFOLLOW | O_CLOEXEC, c->mode);
		if (f < 0)
			return -errno;
		n = entry_of(fd, (char *)(c + 1), (void *)out);
		*(struct fuse_open_out *)(out + sizeof(struct fuse_entry_out)) = (struct fuse_open_out){.fh = f};
		return n < 0 ? n : n + (int)sizeof(struct fuse_open_out);
	}
	case FUSE_MKDIR: {
		const struct fuse_mkdir_in *m = (void *)in;
		return mkdirat(fd, (char *)(m + 1), m->mode) < 0 ? -errno : entry_of(fd, (char *)(m + 1), (void *)out);
	}
	case FUSE_UNLINK:
		return unlinkat(fd, in, 0) < 0 ? -errno : 0;
	case FUSE_RMDIR:
		return unlinkat(fd, in, AT_REMOVEDIR) < 0 ? -errno : 0;
	case FUSE_STATFS: {
		struct statvfs s;
		if (fstatvfs(fd, &s) < 0)
			return -errno;
		*(struct fuse_statfs_out *)out = (struct fuse_statfs_out){.st = {.blocks = s.f_blocks, .bfree = s.f_bfree, .bavail = s.f_bavail,
			.files = s.f_files, .ffree = s.f_ffree, .bsize = s.f_bsize, .namelen = s.f_namemax, .frsize = s.f_frsize}};
		return sizeof(struct fuse_statfs_out);
	}
	}
	return -ENOSYS;
}

// answer makes the whole reply to the request in msg; 0: there is none.
static int answer(const char *msg, char *reply)
{
	const struct fuse_in_header *h = (void *)msg;
	struct fuse_out_header *o = (void *)reply;
	int n = serve(h, msg + sizeof *h, reply + sizeof *o);
	if (n == 1 << 30)
		return 0;
	*o = (struct fuse_out_header){.len = sizeof *o + (n < 0 ? 0 : n), .error = n < 0 ? n : 0, .unique = h->unique};
	return o->len;
}

static char *buffer(void)
{
	char *b = malloc(BUFFER);
	if (!b)
		die("malloc");
	memset(b, 1, BUFFER); // the pages are there
	return b;
}

static void send_all(int sock, const char *b, int n)
{
	while (n > 0) {
		int sent = write(sock, b, n);
		if (sent < 0)
			exit(0);
		b += sent;
		n -= sent;
	}
}

// receive reads until a whole message is at the beginning of b, which has *have bytes, and returns its length.
static int receive(int sock, char *b, int *have)
{
	while (*have < 4 || *have < *(int *)b) {
		int n = read(sock, b + *have, BUFFER - *have);
		if (n <= 0)
			exit(0);
		*have += n;
	}
	return *(int *)b;
}

static void drop(char *b, int *have, int n)
{
	*have -= n;
	memmove(b, b + n, *have);
}

// next_request returns the length of the request that it has read, and ends the process when the file system is unmounted.
static int next_request(int dev, char *b)
{
	for (;;) {
		int n = read(dev, b, BUFFER);
		if (n > 0)
			return n;
		if (errno == ENODEV)
			exit(0);
		if (errno == EAGAIN)
			return 0;
	}
}

static void serve_device(int dev)
{
	char *in = buffer(), *out = buffer();
	for (;;) {
		next_request(dev, in);
		int n = answer(in, out);
		if (n && write(dev, out, n) < 0 && errno != ENOENT)
			die("write /dev/fuse");
	}
}

static void serve_socket(int sock)
{
	char *in = buffer(), *out = buffer();
	for (int have = 0;;) {
		int n = receive(sock, in, &have);
		int m = answer(in, out);
		if (m)
			send_all(sock, out, m);
		drop(in, &have, n);
	}
}

static void relay(int dev, int sock)
{
	char *up = buffer(), *down = buffer();
	fcntl(dev, F_SETFL, O_NONBLOCK);
	struct pollfd fds[] = {{dev, POLLIN, 0}, {sock, POLLIN, 0}};
	for (int have = 0;;) {
		poll(fds, 2, -1);
		if (fds[1].revents) {
			int n = read(sock, down + have, BUFFER - have);
			if (n <= 0)
				exit(0);
			have += n;
			while (have >= 4 && have >= *(int *)down) {
				n = *(int *)down;
				if (write(dev, down, n) < 0 && errno != ENOENT)
					die("write /dev/fuse");
				drop(down, &have, n);
			}
		}
		int n = next_request(dev, up);
		if (n)
			send_all(sock, up, n);
	}
}

static double used(int who)
{
	struct rusage u;
	getrusage(who, &u);
	return (u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1e6 + u.ru_utime.tv_usec + u.ru_stime.tv_usec;
}

static int ping_pong(int n)
{
	char b[80] = {0};
	int socks[2];
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, socks) < 0)
		die("socketpair");
	switch (fork()) {
	case -1:
		die("fork");
	case 0:
		close(socks[0]);
		while (read(socks[1], b, sizeof b) == sizeof b)
			if (write(socks[1], b, sizeof b) < 0)
				break;
		exit(0);
	}
	close(socks[1]);
	double begin = used(RUSAGE_SELF);
	for (int i = 0; i < n; i++)
		if (write(socks[0], b, sizeof b) != sizeof b || read(socks[0], b, sizeof b) != sizeof b)
			die("ping");
	double mine = used(RUSAGE_SELF) - begin;
	close(socks[0]);
	wait(NULL);
	printf("%.3f\n", (mine + used(RUSAGE_CHILDREN)) / n);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "pingpong"))
		return ping_pong(atoi(argv[2]));
	if (argc != 4 || (strcmp(argv[1], "server") && strcmp(argv[1], "relay"))) {
		fprintf(stderr, "usage: %s server|relay DIR MOUNTPOINT, or pingpong N\n", argv[0]);
		return 2;
	}
	struct rlimit files;
	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	int root = open(argv[2], O_PATH | O_DIRECTORY);
	if (root < 0)
		die(argv[2]);
	int dev = open("/dev/fuse", O_RDWR);
	if (dev < 0)
		die("/dev/fuse");
	if (root != 3) {
		if (dev == 3)
			dev = dup(dev);
		dup2(root, 3);
	}
	char options[100];
	snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other", dev);
	if (mount("floor", argv[3], "fuse.floor", MS_NOSUID | MS_NODEV, options) < 0)
		die("mount");
	umask(0);
	if (!strcmp(argv[1], "server"))
		serve_device(dev);
	int socks[2], size = 4 << 20;
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, socks) < 0)
		die("socketpair");
	for (int i = 0; i < 2; i++)
		setsockopt(socks[i], SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
	pid_t parent = getpid();
	switch (fork()) {
	case -1:
		die("fork");
	case 0:
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			exit(0);
		close(dev);
		close(socks[0]);
		serve_socket(socks[1]);
	}
	close(socks[1]);
	relay(dev, socks[0]);
}
