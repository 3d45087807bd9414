// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	shellPort  = 2222 // shell.socket of image/guest.sh
	notifyPort = 2223 // where the guest's systemd says READY=1
)

// Caches are the modes of virtiofsd's --cache, and the names by which virtiofs offers Config.Share.
var Caches = []string{"auto", "always", "never"}

// Config says how to boot. The zero value is a VM for tests.
type Config struct {
	Share       string // a folder of this machine that virtiofs offers to the guest, by the names of Caches; "" for none
	Memory      int    // MiB; 0: 1024
	Interactive bool   // the VM's serial console is this program's terminal

	Credentials map[string]string // for the guest's systemd, by name (SMBIOS, type 11)
	CommandLine map[string]string // the same on the kernel's command line
	Reboots     bool              // a VM that restarts does so, by Reboot; else it ends
}

// VM is a running virtual machine. Methods may be called concurrently.
type VM struct {
	work      string
	processes []*process // in the order of their start; the last is QEMU
	states    net.Listener
	listening sync.WaitGroup

	mu    sync.Mutex
	ready chan struct{} // closed when the guest's systemd says so, of this boot
}

// Boot boots a VM and returns when its systemd has started every unit. Close it in the end.
// The VM writes into a throw-away layer over the image, so any number may run at once.
func Boot(ctx context.Context, im *Images, c Config) (_ *VM, err error) {
	work, err := os.MkdirTemp("", "transfused-vm-")
	if err != nil {
		return nil, fmt.Errorf("vm: %w", err)
	}
	vm := &VM{work: work, ready: make(chan struct{})}
	defer func() {
		if err != nil {
			err = fmt.Errorf("vm: %w\n%s", err, vm.Logs())
			vm.Close()
		}
	}()
	if vm.states, err = net.Listen("unix", fmt.Sprintf("%s_%d", vm.Socket(), notifyPort)); err != nil {
		return nil, err
	}
	vm.listening.Go(vm.takeStates)

	room := room{tools: filepath.Join(im.Tools, "root"), work: work, image: im.Guest, share: c.Share}
	err = vm.serve(ctx, room, "vhost.sock", "vhost-device-vsock", "--guest-cid=7",
		"--tx-buffer-size=32768", // with less, version 0.3.0 drops packets that the guest sends in several descriptors, and the stream hangs
		"--socket="+room.path("vhost.sock"), "--uds-path="+room.path("vm.sock"))
	if err != nil {
		return nil, err
	}
	memory := c.Memory
	if memory == 0 {
		memory = 1024
	}
	args := []string{
		"qemu-system-x86_64", "-nodefaults", "-nographic", "-serial", "mon:stdio",
		"-smp", "2", "-m", strconv.Itoa(memory),
		"-object", fmt.Sprintf("memory-backend-memfd,id=m,size=%dM,share=on", memory), "-machine", "q35,memory-backend=m,sata=off",
		"-kernel", "/image/vmlinuz", "-initrd", "/image/initrd.img",
		"-drive", "file=/image/disk.img,format=raw,if=virtio,snapshot=on,cache=unsafe",
		"-chardev", "socket,id=vsock,path=" + room.path("vhost.sock"), "-device", "vhost-user-vsock-pci,chardev=vsock",
	}
	// An emulated CPU has nothing to be guarded against, and is quicker without: find by a quarter.
	commandLine := fmt.Sprintf("root=/dev/vda rw console=ttyS0 panic=-1 quiet mitigations=off no5lvl systemd.set_credential=vmm.notify_socket:vsock-stream:2:%d", notifyPort)
	for name, text := range c.CommandLine {
		commandLine += fmt.Sprintf(" systemd.set_credential_binary=%s:%s", name, base64.StdEncoding.EncodeToString([]byte(text)))
	}
	args = append(args, "-append", commandLine)
	if !c.Reboots {
		args = append(args, "-no-reboot")
	}
	if os.Getenv("TRANSFUSED_VM_KVM") != "" {
		args = append(args, "-accel", "kvm", "-cpu", "host")
	} else {
		// Without the checks of user memory, which the kernel turns on and off around every copy: a sixth less for programs that start.
		args = append(args, "-accel", "tcg,thread=multi", "-cpu", "max,smap=off,smep=off,pku=off,umip=off")
	}
	for name, text := range c.Credentials {
		args = append(args, "-smbios", fmt.Sprintf("type=11,value=io.systemd.credential.binary:%s=%s", name, base64.StdEncoding.EncodeToString([]byte(text))))
	}
	if c.Share != "" {
		for _, cache := range Caches {
			err := vm.serve(ctx, room, cache+".sock", "virtiofsd", "--socket-path="+room.path(cache+".sock"), "--shared-dir=/share", "--sandbox=none", "--cache="+cache)
			if err != nil {
				return nil, err
			}
			args = append(args, "-chardev", "socket,id="+cache+",path="+room.path(cache+".sock"), "-device", "vhost-user-fs-pci,chardev="+cache+",tag="+cache)
		}
	}
	if err := vm.start(room, c.Interactive, args...); err != nil {
		return nil, err
	}
	return vm, vm.waitReady(ctx)
}

// Socket is the VM's hybrid vsock socket: a program of this machine reaches the guest's
// port P by hybrid:Socket:P, and listens for it on the same address.
func (vm *VM) Socket() string { return filepath.Join(vm.work, "vm.sock") }

// Dir is the VM's work folder, removed by Close.
func (vm *VM) Dir() string { return vm.work }

// Logs is what the VM's console and the programs around it wrote, for the report of a failure.
func (vm *VM) Logs() string {
	var b strings.Builder
	logs, _ := filepath.Glob(filepath.Join(vm.work, "*.log")) // the pattern is well-formed
	for _, log := range logs {
		if text, err := os.ReadFile(log); err == nil && len(text) > 0 {
			fmt.Fprintf(&b, "--- %s\n%s\n", filepath.Base(log), lastLines(text, 60))
		}
	}
	return b.String()
}

// Reboot restarts the guest, whose disk stays as it is, and returns when it is up again. It takes Config.Reboots.
func (vm *VM) Reboot(ctx context.Context) error {
	vm.mu.Lock()
	vm.ready = make(chan struct{})
	vm.mu.Unlock()
	// With a pause, so that the answer still comes.
	if _, err := vm.Run(ctx, "systemd-run --quiet --on-active=0.5 --timer-property=AccuracySec=50ms systemctl reboot"); err != nil {
		return fmt.Errorf("vm: reboot: %w", err)
	}
	return vm.waitReady(ctx)
}

// Wait returns when the VM has powered off.
func (vm *VM) Wait() { <-vm.processes[len(vm.processes)-1].done }

// Close ends the VM, without shutting it down, and removes its work folder.
func (vm *VM) Close() error {
	for _, p := range vm.processes {
		p.stop()
	}
	if vm.states != nil {
		vm.states.Close()
		vm.listening.Wait()
	}
	return os.RemoveAll(vm.work)
}

// room is what the host's side of a VM sees: the tools' tree with a few folders bound into it.
type room struct {
	tools, work, image, share string
}

// path is the name within the room of a file in the work folder. It tells which VM it is of,
// so that /proc/net/unix does too.
func (r room) path(name string) string {
	return filepath.Join("/work", filepath.Base(r.work), name)
}

// enter is a shell script: it makes the room's mounts and becomes the program. They are in a
// namespace of its own, so nothing is left to unmount. Its arguments are the room's folders and the program.
const enter = `
tools=$1 work=$2 image=$3 share=$4; shift 4
mount -t tmpfs tmpfs "$tools/work"
mkdir "$tools/work/${work##*/}"
mount --bind "$work" "$tools/work/${work##*/}"
mount --bind "$image" "$tools/image"
if [ "$share" ]; then mount --bind "$share" "$tools/share"; fi
mount --rbind /dev "$tools/dev"
mount --rbind /proc "$tools/proc"
exec chroot "$tools" env PATH=/usr/bin:/usr/sbin:/usr/libexec TMPDIR="/work/${work##*/}" "$@"
`

// start starts a program in the room. Its output goes to a log in the work folder, or to the terminal.
func (vm *VM) start(r room, terminal bool, args ...string) error {
	cmd := exec.Command("unshare", append([]string{"--mount", "--propagation=private", "sh", "-eu", "-c", enter, "sh",
		r.tools, r.work, r.image, r.share}, args...)...)
	if terminal {
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	} else {
		log, err := os.Create(filepath.Join(r.work, fmt.Sprintf("%d-%s.log", len(vm.processes), args[0])))
		if err != nil {
			return err
		}
		defer log.Close() // the program has its own
		cmd.Stdout, cmd.Stderr = log, log
	}
	p, err := start(cmd)
	if err != nil {
		return err
	}
	vm.processes = append(vm.processes, p)
	return nil
}

// serve starts a program in the room and waits until it listens on the socket of that name.
func (vm *VM) serve(ctx context.Context, r room, socket string, args ...string) error {
	if err := vm.start(r, false, args...); err != nil {
		return err
	}
	p := vm.processes[len(vm.processes)-1]
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	// The kernel tells nobody that a socket listens, and to connect would use up the one connection that these programs take.
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if listens(r.path(socket)) {
			return nil
		}
		select {
		case <-tick.C:
		case <-p.done:
			return fmt.Errorf("%s: ended early: %v", args[0], p.err)
		case <-ctx.Done():
			return fmt.Errorf("%s: does not listen on %s: %w", args[0], socket, ctx.Err())
		}
	}
}

// listens says whether some process listens on a Unix socket bound to that very name.
func listens(name string) bool {
	f, err := os.Open("/proc/net/unix")
	if err != nil {
		return false
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		// Num RefCount Protocol Flags Type St Inode Path; the flag is __SO_ACCEPTCON (linux/net.h)
		if f := strings.Fields(s.Text()); len(f) == 8 && f[7] == name && f[3] == "00010000" {
			return true
		}
	}
	return false
}

// takeStates takes the messages of the guest's systemd. It does so until the end, since systemd
// waits for each to be taken.
func (vm *VM) takeStates() {
	text := make([]byte, 4096)
	for {
		c, err := vm.states.Accept()
		if err != nil {
			return
		}
		// systemd waits for our end of the connection to close, and vhost-device-vsock does not
		// pass its half-close on: one read takes the message, which is one small packet.
		n, _ := c.Read(text) // a message that breaks off is not the one
		c.Close()
		if strings.Contains(string(text[:n]), "READY=1") {
			vm.mu.Lock()
			select {
			case <-vm.ready:
			default:
				close(vm.ready)
			}
			vm.mu.Unlock()
		}
	}
}

// waitReady waits until the guest is up.
func (vm *VM) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute) // a machine that does much else takes three
	defer cancel()
	qemu := vm.processes[len(vm.processes)-1]
	vm.mu.Lock()
	ready := vm.ready
	vm.mu.Unlock()
	select {
	case <-ready:
		return nil
	case <-qemu.done:
		return fmt.Errorf("qemu ended during the boot: %v", qemu.err)
	case <-ctx.Done():
		return fmt.Errorf("the guest did not come up: %w", ctx.Err())
	}
}
