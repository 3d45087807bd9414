// SPDX-License-Identifier: Apache-2.0

package sd

import "log/slog"

// Event is a kind of record that the journal knows by its MESSAGE_ID, and explains by the catalog
// (systemd/transfused.catalog): journalctl -x.
type Event string

// The events. Their ids are random, and never change.
const (
	HostConnected     Event = "6b0c6d3f7d1e4c0f9a53c1d6f0a5e201"
	HostLost          Event = "0a4f0f4f8d7c4f7fb0c9b3f65c1b8e02"
	Mounted           Event = "d1b5b6a4a0f84e0db0f24c7c5f0d7a03"
	Unmounted         Event = "5f3f1a7be5c14ed5a3b8b3c5d8b7f104"
	MountLost         Event = "91b9d4d5c1864f6d8ae4b65cf2f4ac05" // it ended, and nobody asked for that
	MountFailed       Event = "c6a3a1b2f8d94b1f9f0b54fbb7f0de06" // it can't be made
	MountTakenUp      Event = "2e6d0b8d7f7d4a33a2bdba4d5c9f1b07" // by a daemon that was started again
	StoreRefused      Event = "b7a0c53dc2b24c93a7fa3d9d94d0a508" // by the service manager's file descriptor store
	ConnectionRefused Event = "47f2f0c9ad5e4a0a8e8c0b6c7d1e3f09"
	ConfigRefused     Event = "e8c1d3a57b424d5b9d3a5f0e6c7b2a10" // the one before stays in force
	Reloaded          Event = "3c9e5a7f1b2d4c6e8f0a1b3c5d7e9f11"
	SessionBegan      Event = "a5d7c9e1f3b54d7f9b1c3e5a7d9f1b12"
	SessionEnded      Event = "7e9f1b3d5c7a4e9fb1d3c5e7a9f1b313"
	WorkerDied        Event = "f1b3d5e7a9c14b3d8e5f7a9c1d3e5b14"
	GuestSays         Event = "1d3f5b7e9a1c4d3fa5b7e9c1f3d5a715" // a line of a guest's own log
)

// eventKey is the attribute that has an Event. Text logs leave it out.
const eventKey = "message_id"

// IsEvent says whether an attribute is one of Attr.
func IsEvent(a slog.Attr) bool { return a.Key == eventKey }

// Attr makes e an attribute of a record.
func (e Event) Attr() slog.Attr { return slog.String(eventKey, string(e)) }
