// SPDX-License-Identifier: Apache-2.0

// Package sd is what a program does as a service of systemd: it takes the sockets that were opened for it, tells when it is
// ready and how it does, and logs to the journal. Started otherwise it does nothing of that, and the program runs the same.
//
// Decisions:
//   - The files are taken once, by Take, before anything is started: the variables are removed from the environment, so
//     that no child takes them for its own.
//   - What is told of the state never fails a service: nobody may be listening.
//   - A record in the journal has its text, with the attributes as they stand in a terminal, and each attribute as a field
//     TRANSFUSED_NAME beside it. Values are data: the journal's protocol gives each its length, so that no peer can forge a field
//     or a line.
package sd
