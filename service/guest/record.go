// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/sd"
)

// Store keeps descriptors when this process ends, for the next one (sd.Store).
type Store interface {
	// Put returns when duplicates of files are kept.
	Put(name string, files ...*os.File) error
	Remove(name string) error
}

// recordFormat is the format of records, and recordReads the oldest program's that can read them. A program takes a record whose reads
// is at most its own format, and ignores what it does not know: one release up or down can take up the mounts of the other.
const (
	recordFormat = 1
	recordReads  = 1
)

// maxRecord bounds what is read of a record, in bytes.
const maxRecord = 256 << 10

// record is what a daemon must know of a mount to go on with it. It is kept beside the mount's device, in a memfd to which each
// change is appended as a line of JSON: the last whole line counts, wherever its writer was killed. There are few: what INIT
// agreed, and where it was attached.
type record struct {
	Format, Reads int
	ID            uint64
	Spec          MountSpec
	Configured    bool
	Kept          bool // it is made again when it is lost
	Nowhere       bool
	Session       string // in hexadecimal
	WireID        uint32
	Options       MountOptions
	Mount         mountID
	Streams       int // as many as there were; 0: one, of a program that knew no more
	NoFlush       bool
	HostReadOnly  bool
	Agreed        agreed // zero: INIT was not answered
}

func (r *record) name() string { return fmt.Sprintf("%d.0", r.ID) }

// streams is how many the mount goes on with.
func (r *record) streams() int { return min(max(1, r.Streams), maxStreams) }

func (r *record) session() (id [16]byte, err error) {
	b, err := hex.DecodeString(r.Session)
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("session id %q", r.Session)
	}
	return [16]byte(b), nil
}

// newRecordFile makes the file of a record.
func newRecordFile(r *record) (*os.File, error) {
	fd, err := unix.MemfdCreate("transfused-mount", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "record")
	if err := r.append(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// append writes r behind what is in f.
func (r *record) append(f *os.File) error {
	r.Format, r.Reads = recordFormat, recordReads
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(append(b, '\n'), end)
	return err
}

// readRecord takes what was stored under one name apart: the device and its record. It owns the files if it fails.
func readRecord(s sd.Stored) (r *record, dev, file *os.File, err error) {
	defer func() {
		if err != nil {
			for _, f := range s.Files {
				f.Close()
			}
		}
	}()
	for _, f := range s.Files {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return nil, nil, nil, os.NewSyscallError("fstat", err)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFCHR && dev == nil {
			dev = f
		} else if st.Mode&unix.S_IFMT == unix.S_IFREG && file == nil {
			file = f
		}
	}
	if dev == nil || file == nil || len(s.Files) != 2 {
		return nil, nil, nil, errors.New("it is no device with its record")
	}
	b, err := io.ReadAll(io.NewSectionReader(file, 0, maxRecord))
	if err != nil {
		return nil, nil, nil, err
	}
	whole := bytes.LastIndexByte(b, '\n')
	if whole < 0 {
		return nil, nil, nil, errors.New("its record is not complete")
	}
	b = b[:whole]
	b = b[bytes.LastIndexByte(b, '\n')+1:]
	r = &record{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, nil, nil, fmt.Errorf("its record: %w", err)
	}
	if r.Reads > recordFormat || r.Reads <= 0 {
		return nil, nil, nil, fmt.Errorf("its record has format %d, which this version can't read: start the version that made it, or unmount %s by umount -l", r.Format, r.Spec.Dir)
	}
	if r.ID == 0 || r.name() != s.Name {
		return nil, nil, nil, fmt.Errorf("its record is of mount %d", r.ID)
	}
	return r, dev, file, nil
}
