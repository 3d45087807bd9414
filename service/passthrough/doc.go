// SPDX-License-Identifier: Apache-2.0

// Package passthrough is the file system behind an export: it serves FUSE requests of a guest from a directory of the host.
//
// The guest is not trusted. [FS.Serve] reads what it sends; nothing in it is used before it was checked. What the
// guest asks is done to the export's tree and to nothing else; what it does wrong is an errno for that request. Only a
// request whose length cannot be true ends the stream, because the next one's beginning cannot be known.
//
// Who owns what: an FS owns its root directory and every descriptor it opens, and closes them in Close. A stream's goroutines
// are waited for by Serve. A request, its buffers and what it pinned belong to the goroutine that serves it.
//
// Decisions:
//
//   - A node is a host inode: device, inode number, mount, birth time. It is found by one name in a directory that
//     is already known, never by a path, so there is nothing in a name to lead out. Node ids are not used twice.
//   - A node that is only looked at has no descriptor: LOOKUP and GETATTR are one statx each. When it is used it is opened (O_PATH)
//     by its name in its parent, and compared with what it was; anything else under that name is ESTALE, and the
//     guest's kernel looks again. So a large tree costs memory alone, and a server without privilege works in the same way. Descriptors
//     are kept as long as there is room; nodes whose descriptor was closed are found by file handle where the host lets us.
//   - A directory that the guest itself is about to remove gets a descriptor first, as it may be somebody's working directory, and
//     so does a file that is open, has another name, or is replaced by a rename. Of any other file only the attributes stay: an O_PATH
//     descriptor of it in the guest can be looked at, and not be opened any more (ENOENT).
//   - The guest's kernel may not have heard yet what is under a name now. A directory that it would remove while it believes in another is
//     ESTALE, and it looks again: or it would take the other one for dead. What it has renamed while it believed in another it forgets.
//   - After each change of names the directory's attributes go ahead of the reply, since the guest's kernel is about to ask for them.
//   - A directory that the host moves out of the export while the guest uses it stays usable, as for any process of the host
//     that has it open.
//   - Files are opened through /proc/self/fd from the checked descriptor, and only regular files and directories; a device
//     or FIFO is never opened, whatever is put in its place. CREATE is exclusive; what exists already is opened like any other.
//   - Directory offsets are the host's. A directory is read for as much as fits one reply, so nothing is kept between two.
//   - O_DIRECT and O_APPEND are not passed on to the host's file; see keepFlags.
//   - What the guest may cache is a mode of the mount (CacheMode). In the mode coherent it is told of changes (Changed, Notify), and may
//     cache for long what it would be told of: all of the root's mount where changes come by Changed, else what is in the directories that
//     it has looked into, each of which is watched (DirWatches); the rest for Config.TTL. See caching.
//   - Directories are not opened (OPENDIR is ENOSYS), so that the guest's kernel caches their names; the descriptors to read them by are
//     ours, for a moment. See shared.
//   - For the guest's inotify it makes calls that change nothing, and whose requests are answered as they want it. See Actor and acting.
//     One that is Plain may follow a path out of the mount, and is not asked to where it would. See leads.
//   - Requests are served in turns of reading; see stream. A 4 KiB read is two system calls (read, pread) and a write. Large data do not
//     pass our memory where the stream hands on pages; see bulk.
//   - The guest's trusted.* are user.transfuse.trusted.* on the host, and so EPERM on a symbolic link; see trustedRule.
//   - Locks are the host's; see lockTable. Owners are those of the guest's callers; see creds.
//
// README.md lists what answers ENOSYS, what else is not done, and why.
package passthrough
