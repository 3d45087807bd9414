// SPDX-License-Identifier: Apache-2.0

// Package config reads the files that both programs have: a configuration in TOML, and a token. What is in them is the
// programs' own business.
//
// The configuration NAME, "transfused" for the guest's daemon and "host" for the host's server, is read from these, later
// ones overriding those before them key by key:
//
//  1. The main file, transfuse/NAME.toml in /etc, /run or /usr/lib: the first that there is, whole. Those in the others are
//     not read.
//  2. The drop-ins, transfuse/NAME.toml.d/*.toml in the same three directories: by their names, whichever directory they are
//     in. Of several with one name, that in /etc is read and no other, else that in /run.
//
// And for the guest the credential transfused.toml of systemd, which a VMM hands it at boot. It overrides what any file of
// /usr/lib says, and is overridden by any of /run and /etc. So flags come before /etc, then /run, the credential, /usr/lib.
// A service's own credential ($CREDENTIALS_DIRECTORY) comes before the system's (/run/credentials/@system).
//
// The credential, on the kernel's command line one line of TOML:
//
//	qemu … -smbios type=11,value=io.systemd.credential.binary:transfused.toml=$(base64 -w0 transfused.toml)
//	systemd.set_credential="transfused.toml:mount.code.dir='/mnt/code'"
//
// Key by key means: a table, as [mount.NAME] is, is merged with the one of the same name, so that a drop-in can change one
// key of it. Anything else replaces what was there, also a list. A main file or drop-in that is a link to /dev/null, or
// empty, masks those of its name in the directories below. With --config FILE that file is read and no other.
//
// Decisions:
//   - All this is what systemd does with its own (systemd-system.conf(5)), but for lists, which it joins: a list that can't
//     be made shorter is no use where it says who may see an export.
//   - The credential is merged with the main file of /etc, and not hidden by it: an image that has settings of its own can
//     still be handed mounts.
//   - A mistake is one line that begins with the file and the line, as compilers do it. Each file is to be right by itself,
//     also in what is overridden: what overrides it may go away.
//   - An unknown key is a mistake: most often it is a known one, misspelt.
//   - A token that is handed over as a credential, PROGRAM.token, counts where no token file is named.
//   - transfusectl cat-config needs no more than Cat, which shows files with mistakes too, and ReadAll with a nil v and
//     Effective for what they come to. What the keys mean stays with the programs.
package config
