// SPDX-License-Identifier: Apache-2.0

// Package api is what an administrator can ask of the two programs: transfused implements Guest, transfuse-host implements Host. Their control
// sockets (package varlink) and D-Bus (package bus) carry it, and transfusectl shows it.
//
// Decisions:
//   - Both carriers know the daemons by these interfaces alone, so that they can be tested without one, and have the same
//     words for the same things.
//   - Types are JSON on the control socket as their tags say. A field that is added later is one that readers ignore.
//   - An error that an administrator meets is an *Error: a kind for programs, an errno for exit codes, and a text that names the thing,
//     the reason and the mend.
package api
