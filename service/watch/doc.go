// SPDX-License-Identifier: Apache-2.0

// Package watch tells what changes in directories of the host, as soon as the kernel tells it.
//
// [Watcher] watches whole trees, and needs privilege; [Dirs] watches one directory after the other, and needs none.
//
// # Watcher
//
// A [Watcher] uses fanotify: one mark on the file system, however many directories of it are watched and however
// large they are. It needs Linux 5.17, CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH in the first user namespace.
//
// What is told:
//
//   - Directory, name and inode are those of the change; what is told of the inode (its mode, whether it is still there), and whether the
//     directory is below a tree, is read when the change is told. A change says that something happened to these names, and whoever wants to
//     know what they are now has to look: the kernel joins changes of one name, inode and process that nobody has
//     read yet, so Create and Delete may be in one Change, in an order that is not known, and a joined change stands where the first of them was.
//   - A file with several names is told by the one that was used, and a second Attrib may come with the Inode alone (its
//     count of names changed). So may a change through a descriptor whose file has no name any more, or was found by its handle; where the
//     name and so the tree is not known, every tree of the file system is told.
//   - A move into a tree is Create, out of it Delete, within it Rename. What is below a directory that moves is not told one by one.
//   - A change in a directory that is removed before the change is read may be told by the directory's Delete alone.
//   - [Lost] comes after the queue was full (fs.fanotify.max_queued_events; changes outside the trees fill it too), and when a tree's
//     own directory is deleted or moved. The tree follows the directory that was moved.
//
// What is not told:
//
//   - Writes through a shared memory mapping. CloseWrite comes when its file was closed and the last mapping is gone;
//     on an overlay it comes with the closing, and of what is written later through the mapping nothing is told.
//   - Changes that this kernel does not make: on a disk below the file system, by other machines. [Watcher.Add] refuses file systems that
//     several machines share, and FUSE (fuseblk too: it has no file system id).
//   - File systems that are mounted below a tree. Each is added as a tree, or not believed for long.
//   - Changes of access times, and of directories' own times and sizes: a name that came or went tells the latter.
//   - Directories more than 4096 levels below the root of their mount.
//
// A btrfs subvolume is refused by the kernel unless it is the file system's first (subvolid=5), of which those below are told; so is an overlay that was not mounted with
// nfs_export=on. Changes of the layers beneath an overlay are not told, and not defined either.
//
// Where a directory is, is known from its parents, not from paths: each that was met is kept with a pointer to the one above it, in a bounded
// cache, and a move changes one pointer. They are looked up in the mount through which the tree was given, since a mount of
// a part of the file system shows what is outside of it by misleading paths.
//
// # Dirs
//
// A [Dirs] uses inotify: one watch for each directory that is added, of which the kernel allows fs.inotify.max_user_watches to a user
// (each keeps its directory's inode in memory, about a kilobyte). It tells directories by the ids they were added with, and names in them.
//
// The two halves of a move are paired where they are read together, or within a millisecond; the rest, and moves from or into a
// directory that is not watched, are Delete and Create.
//
// It tells less than a Watcher: neither who made a change, nor which inode it was, nor what happened to a file by a name in a directory that is
// not watched (nor that it got that name), by a handle, or by a descriptor when the name is gone. A file with several names is told by the one that was used.
// [Lost] comes after the queue was full (fs.inotify.max_queued_events).
package watch
