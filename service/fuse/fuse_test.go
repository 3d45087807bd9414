// SPDX-License-Identifier: Apache-2.0

package fuse

import (
	"bytes"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
)

// The sizes of fuse.h 7.45 on a 64-bit machine, counted from the header.
func TestSizes(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"fuse_in_header", unsafe.Sizeof(InHeader{}), 40},
		{"fuse_out_header", unsafe.Sizeof(OutHeader{}), 16},
		{"fuse_attr", unsafe.Sizeof(Attr{}), 88},
		{"fuse_sx_time", unsafe.Sizeof(SxTime{}), 16},
		{"fuse_statx", unsafe.Sizeof(Statx{}), 256},
		{"fuse_kstatfs", unsafe.Sizeof(Kstatfs{}), 80},
		{"fuse_file_lock", unsafe.Sizeof(FileLock{}), 24},
		{"AheadOut", unsafe.Sizeof(AheadOut{}), 120},
		{"fuse_entry_out", unsafe.Sizeof(EntryOut{}), 128},
		{"fuse_forget_in", unsafe.Sizeof(ForgetIn{}), 8},
		{"fuse_forget_one", unsafe.Sizeof(ForgetOne{}), 16},
		{"fuse_batch_forget_in", unsafe.Sizeof(BatchForgetIn{}), 8},
		{"fuse_getattr_in", unsafe.Sizeof(GetattrIn{}), 16},
		{"fuse_attr_out", unsafe.Sizeof(AttrOut{}), 104},
		{"fuse_statx_in", unsafe.Sizeof(StatxIn{}), 24},
		{"fuse_statx_out", unsafe.Sizeof(StatxOut{}), 288},
		{"fuse_mknod_in", unsafe.Sizeof(MknodIn{}), 16},
		{"fuse_mkdir_in", unsafe.Sizeof(MkdirIn{}), 8},
		{"fuse_rename_in", unsafe.Sizeof(RenameIn{}), 8},
		{"fuse_rename2_in", unsafe.Sizeof(Rename2In{}), 16},
		{"fuse_link_in", unsafe.Sizeof(LinkIn{}), 8},
		{"fuse_setattr_in", unsafe.Sizeof(SetattrIn{}), 88},
		{"fuse_open_in", unsafe.Sizeof(OpenIn{}), 8},
		{"fuse_create_in", unsafe.Sizeof(CreateIn{}), 16},
		{"fuse_open_out", unsafe.Sizeof(OpenOut{}), 16},
		{"fuse_release_in", unsafe.Sizeof(ReleaseIn{}), 24},
		{"fuse_flush_in", unsafe.Sizeof(FlushIn{}), 24},
		{"fuse_read_in", unsafe.Sizeof(ReadIn{}), 40},
		{"fuse_write_in", unsafe.Sizeof(WriteIn{}), 40},
		{"fuse_write_out", unsafe.Sizeof(WriteOut{}), 8},
		{"fuse_fsync_in", unsafe.Sizeof(FsyncIn{}), 16},
		{"fuse_setxattr_in", unsafe.Sizeof(SetxattrIn{}), 16},
		{"fuse_setxattr_in compat", unsafe.Sizeof(SetxattrInCompat{}), 8},
		{"fuse_getxattr_in", unsafe.Sizeof(GetxattrIn{}), 8},
		{"fuse_getxattr_out", unsafe.Sizeof(GetxattrOut{}), 8},
		{"fuse_lk_in", unsafe.Sizeof(LkIn{}), 48},
		{"fuse_lk_out", unsafe.Sizeof(LkOut{}), 24},
		{"fuse_access_in", unsafe.Sizeof(AccessIn{}), 8},
		{"fuse_init_in", unsafe.Sizeof(InitIn{}), 64},
		{"fuse_init_in compat", unsafe.Sizeof(InitInCompat{}), 16},
		{"fuse_init_out", unsafe.Sizeof(InitOut{}), 64},
		{"fuse_interrupt_in", unsafe.Sizeof(InterruptIn{}), 8},
		{"fuse_ioctl_in", unsafe.Sizeof(IoctlIn{}), 32},
		{"fuse_ioctl_out", unsafe.Sizeof(IoctlOut{}), 16},
		{"fuse_poll_in", unsafe.Sizeof(PollIn{}), 24},
		{"fuse_poll_out", unsafe.Sizeof(PollOut{}), 8},
		{"fuse_fallocate_in", unsafe.Sizeof(FallocateIn{}), 32},
		{"fuse_lseek_in", unsafe.Sizeof(LseekIn{}), 24},
		{"fuse_lseek_out", unsafe.Sizeof(LseekOut{}), 8},
		{"fuse_copy_file_range_in", unsafe.Sizeof(CopyFileRangeIn{}), 56},
		{"fuse_copy_file_range_out", unsafe.Sizeof(CopyFileRangeOut{}), 8},
		{"fuse_syncfs_in", unsafe.Sizeof(SyncfsIn{}), 8},
		{"fuse_ext_header", unsafe.Sizeof(ExtHeader{}), 8},
		{"fuse_supp_groups", unsafe.Sizeof(SuppGroups{}), 4},
		{"fuse_dirent", unsafe.Sizeof(Dirent{}), 24},
		{"fuse_notify_poll_wakeup_out", unsafe.Sizeof(NotifyPollWakeupOut{}), 8},
		{"fuse_notify_inval_inode_out", unsafe.Sizeof(NotifyInvalInodeOut{}), 24},
		{"fuse_notify_inval_entry_out", unsafe.Sizeof(NotifyInvalEntryOut{}), 16},
		{"fuse_notify_delete_out", unsafe.Sizeof(NotifyDeleteOut{}), 24},
		{"fuse_notify_store_out", unsafe.Sizeof(NotifyStoreOut{}), 24},
		{"fuse_notify_retrieve_out", unsafe.Sizeof(NotifyRetrieveOut{}), 32},
		{"fuse_notify_prune_out", unsafe.Sizeof(NotifyPruneOut{}), 16},

		{"offset fuse_in_header.total_extlen", unsafe.Offsetof(InHeader{}.TotalExtlen), 36},
		{"offset fuse_attr.mode", unsafe.Offsetof(Attr{}.Mode), 60},
		{"offset fuse_entry_out.attr", unsafe.Offsetof(EntryOut{}.Attr), 40},
		{"offset fuse_setattr_in.mode", unsafe.Offsetof(SetattrIn{}.Mode), 68},
		{"offset fuse_setattr_in.uid", unsafe.Offsetof(SetattrIn{}.UID), 76},
		{"offset fuse_init_out.max_write", unsafe.Offsetof(InitOut{}.MaxWrite), 20},
		{"offset fuse_init_out.flags2", unsafe.Offsetof(InitOut{}.Flags2), 32},
		{"offset fuse_init_out.request_timeout", unsafe.Offsetof(InitOut{}.RequestTimeout), 40},
		{"offset fuse_statx.mode", unsafe.Offsetof(Statx{}.Mode), 28},
		{"offset fuse_statx.atime", unsafe.Offsetof(Statx{}.Atime), 64},
		{"offset fuse_statx.rdev_major", unsafe.Offsetof(Statx{}.RdevMajor), 128},
		{"offset fuse_read_in.lock_owner", unsafe.Offsetof(ReadIn{}.LockOwner), 24},
		{"offset fuse_lk_in.lk_flags", unsafe.Offsetof(LkIn{}.LkFlags), 40},
	} {
		if c.got != c.want {
			t.Errorf("%s is %d, want %d", c.name, c.got, c.want)
		}
	}
}

func TestDecodeAppendPut(t *testing.T) {
	want := WriteIn{Fh: 1, Offset: 2, Size: 3, WriteFlags: 4, LockOwner: 5, Flags: 6}
	b := Append([]byte("x"), &want)
	var got WriteIn
	rest, ok := Decode(&got, append(b[1:], "tail"...))
	if !ok || string(rest) != "tail" || got != want {
		t.Errorf("Decode: %+v, rest %q, ok %v", got, rest, ok)
	}
	if _, ok := Decode(&got, b[2:]); ok {
		t.Error("one byte short: ok")
	}
	want.Size = 99
	Put(b[1:], &want)
	Decode(&got, b[1:])
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestDecodeInitIn(t *testing.T) {
	for name, c := range map[string]struct {
		body []byte
		want InitIn
		ok   bool
	}{
		"short":       {make([]byte, 15), InitIn{}, false},
		"before 36":   {Append(nil, &InitInCompat{7, 31, 1, uint32(ASYNC_READ | INIT_EXT)}), InitIn{Major: 7, Minor: 31, MaxReadahead: 1, Flags: 1}, true},
		"without ext": {Append(nil, &InitIn{Major: 7, Minor: 38, Flags2: 4}), InitIn{Major: 7, Minor: 38}, true},
		"with ext": {Append(nil, &InitIn{Major: 7, Minor: 45, Flags: uint32(INIT_EXT), Flags2: 4}),
			InitIn{Major: 7, Minor: 45, Flags: uint32(INIT_EXT), Flags2: 4}, true},
	} {
		got, ok := DecodeInitIn(c.body)
		if diff := cmp.Diff(c.want, got); ok != c.ok || diff != "" {
			t.Errorf("%s: ok %v, %s", name, ok, diff)
		}
	}
	out := InitOut{}
	out.SetFeatures(CREATE_SUPP_GROUP | INIT_EXT)
	if out.Features() != CREATE_SUPP_GROUP|INIT_EXT || out.Flags2 != 4 {
		t.Errorf("features %x", out.Features())
	}
}

func TestGroups(t *testing.T) {
	ext := func(size, typ, n uint32, gids ...uint32) []byte {
		b := Append(nil, &ExtHeader{size, typ})
		b = Append(b, &SuppGroups{n})
		for _, g := range gids {
			b = Append(b, &SuppGroups{g})
		}
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
		return b
	}
	type result struct {
		Rest    string
		Gid     uint32
		Has, OK bool
	}
	for name, c := range map[string]struct {
		ext    []byte
		extlen int // in bytes; -1: as long as ext
		want   result
	}{
		"none":              {nil, -1, result{"name\x00", 0, false, true}},
		"one":               {ext(16, EXT_GROUPS, 1, 100), -1, result{"name\x00", 100, true, true}},
		"empty":             {ext(16, EXT_GROUPS, 0, 100), -1, result{"name\x00", 0, false, true}},
		"after a context":   {append(ext(16, 1, 7, 7), ext(16, EXT_GROUPS, 1, 5)...), -1, result{"name\x00", 5, true, true}},
		"count lies":        {ext(16, EXT_GROUPS, 2, 100), -1, result{}},
		"count overflows":   {ext(16, EXT_GROUPS, 1<<30+1, 100), -1, result{}},
		"size too great":    {ext(24, EXT_GROUPS, 1, 100), -1, result{}},
		"size zero":         {ext(0, EXT_GROUPS, 1, 100), -1, result{}},
		"size not aligned":  {ext(12, EXT_GROUPS, 0, 100), -1, result{}},
		"longer than body":  {ext(16, EXT_GROUPS, 1, 100), 800, result{}},
		"header cut in two": {ext(16, EXT_GROUPS, 1, 100)[:8], -1, result{}},
	} {
		if c.extlen < 0 {
			c.extlen = len(c.ext)
		}
		h := InHeader{TotalExtlen: uint16(c.extlen / 8)}
		rest, gid, has, ok := h.Groups(append([]byte("name\x00"), c.ext...))
		if diff := cmp.Diff(c.want, result{string(rest), gid, has, ok}); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestDirents(t *testing.T) {
	var b []byte
	names := []string{"a", "abcdefgh", "1234567", string(bytes.Repeat([]byte{0xff}, 255))}
	for i, n := range names {
		before := len(b)
		b = AppendDirent(b, uint64(i), uint64(i+1), 8, []byte(n))
		if len(b)-before != DirentLen(len(n)) {
			t.Errorf("%q takes %d, DirentLen says %d", n, len(b)-before, DirentLen(len(n)))
		}
	}
	for i, want := range names {
		d, name, rest, ok := NextDirent(b)
		if !ok || string(name) != want || d.Ino != uint64(i) || d.Off != uint64(i+1) {
			t.Fatalf("entry %d: %+v %q %v", i, d, name, ok)
		}
		b = rest
	}
	if len(b) != 0 {
		t.Errorf("%d bytes left", len(b))
	}
}

func TestOpcodeString(t *testing.T) {
	for o, want := range map[Opcode]string{
		OpLookup: "LOOKUP", OpCopyFileRange64: "COPY_FILE_RANGE_64", 0: "OPCODE(0)", 7: "OPCODE(7)", 1 << 31: "OPCODE(2147483648)",
	} {
		if o.String() != want {
			t.Errorf("%d: %s, want %s", uint32(o), o, want)
		}
	}
}

func TestNoAllocation(t *testing.T) {
	b := make([]byte, 0, 256)
	name := []byte("name\x00")
	n := testing.AllocsPerRun(100, func() {
		var h InHeader
		b = Append(b[:0], &EntryOut{NodeID: 7})
		Decode(&h, b)
		Name(name)
		h.Groups(name)
		b = AppendDirent(b[:0], 1, 2, 3, name)
		b = AppendError(b[:0], 1, 2)
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzRequest decodes as every structure that a guest may send, and what variable parts follow it.
func FuzzRequest(f *testing.F) {
	f.Add(Append(nil, &InHeader{Len: 45, Opcode: OpLookup, NodeID: 1}))
	f.Add(append(Append(nil, &InHeader{TotalExtlen: 2}), "x\x00\x10\x00\x00\x00\x20\x00\x00\x00\x01\x00\x00\x00\x64\x00\x00\x00"...))
	f.Add(Append(nil, &InitIn{Major: 7, Minor: 45}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var h InHeader
		body, ok := Decode(&h, b)
		if ok != (len(b) >= InHeaderSize) {
			t.Fatalf("%d bytes: ok %v", len(b), ok)
		}
		if ok && !bytes.Equal(Append(nil, &h), b[:InHeaderSize]) {
			t.Fatal("encode of decode differs")
		}
		_ = h.Opcode.String()
		if rest, _, _, ok := h.Groups(body); ok && len(rest)+int(h.TotalExtlen)*8 != len(body) {
			t.Fatal("extensions and rest are not the body")
		}
		if name, rest, ok := Name(body); ok && len(name)+1+len(rest) != len(body) {
			t.Fatal("name and rest are not the body")
		}
		DecodeInitIn(body)
	})
}

func FuzzDirents(f *testing.F) {
	f.Add(AppendDirent(AppendDirent(nil, 1, 1, 4, []byte(".")), 2, 2, 8, []byte("a name")))
	f.Add(Append(nil, &Dirent{Namelen: 1<<32 - 1}))
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			d, name, rest, ok := NextDirent(b)
			if !ok {
				return
			}
			again, n2, r2, ok := NextDirent(AppendDirent(nil, d.Ino, d.Off, d.Type, name))
			if !ok || again != d || !bytes.Equal(n2, name) || len(r2) != 0 {
				t.Fatal("decode of encode differs")
			}
			b = rest
		}
	})
}
