// SPDX-License-Identifier: Apache-2.0

// Package guest is the guest's daemon: it takes mounts, and carries FUSE messages between /dev/fuse and the host.
package guest
