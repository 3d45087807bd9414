// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"encoding/xml"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/api"
)

// program is one of the two on a bus, with one object of each kind.
type program struct {
	name string
	root dbus.ObjectPath
	// below are the nodes, as names under root.
	below []string
	own   []string // interfaces
	start func(*testing.T, *testBus)
}

var programs = []program{
	{GuestName, guestRoot, []string{"/mount", "/mount/a1"}, []string{GuestName + ".Manager", GuestName + ".Mount"},
		func(t *testing.T, b *testBus) { serveGuest(t, b, newGuest(aMount("a1")), Config{}) }},
	{HostName, hostRoot, []string{"/session", "/session/s1"}, []string{HostName + ".Manager", HostName + ".Session"},
		func(t *testing.T, b *testBus) {
			h := newHost()
			h.sessions["s1"] = aSession("s1")
			serveHost(t, b, h, Config{})
		}},
}

// What the introspection says is what there is: all nodes, and of each all that can be called and read.
func TestIntrospection(t *testing.T) {
	for _, p := range programs {
		t.Run(p.name, func(t *testing.T) {
			b := runningBus(t)
			p.start(t, b)
			c := b.user()
			nodes := tree(t, c, p.name, "/")
			var want []dbus.ObjectPath
			for path := string(p.root); path != ""; path = path[:strings.LastIndexByte(path, '/')] {
				want = append(want, dbus.ObjectPath(path))
			}
			for _, n := range p.below {
				want = append(want, p.root+dbus.ObjectPath(n))
			}
			want = append(want, "/")
			slices.Sort(want)
			if d := cmp.Diff(want, slices.Sorted(maps.Keys(nodes))); d != "" {
				t.Error(d)
			}
			var own []string
			for path, n := range nodes {
				var names []string
				for _, i := range n.Interfaces {
					names = append(names, i.Name)
					if !strings.HasPrefix(i.Name, "org.freedesktop.") {
						own = append(own, i.Name)
					}
					checkInterface(t, c, p.name, path, i)
				}
				for _, i := range []string{introspectName, propertiesName, peerName} {
					if !slices.Contains(names, i) {
						t.Errorf("%s has no %s", path, i)
					}
				}
				if slices.Contains(names, managerName) != (path == p.root) {
					t.Errorf("%s has %v", path, names)
				}
			}
			slices.Sort(own)
			if d := cmp.Diff(p.own, own); d != "" {
				t.Error(d)
			}
		})
	}
}

// checkInterface compares an interface with what answers. A method is called with one argument too many: its error has the
// types that it wants.
func checkInterface(t *testing.T, c *dbus.Conn, name string, path dbus.ObjectPath, i xmlIface) {
	t.Helper()
	for _, m := range i.Methods {
		_, err := try(c, name, path, i.Name+"."+m.Name, 0, int64(1))
		if i.Name == peerName && m.Name == "Ping" || err == nil {
			wantError(t, err, "org.freedesktop.DBus.Error.InvalidArgs")
			continue
		}
		wantError(t, err, "org.freedesktop.DBus.Error.InvalidArgs", fmt.Sprintf("types %q,", m.types("in")))
		for _, a := range m.Args {
			if a.Name == "" || a.Direction != "in" && a.Direction != "out" {
				t.Errorf("%s.%s has an argument %+v", i.Name, m.Name, a)
			}
		}
	}
	for _, s := range i.Signals {
		for _, a := range s.Args {
			if a.Name == "" || a.Direction != "" {
				t.Errorf("%s.%s has an argument %+v", i.Name, s.Name, a)
			}
		}
	}
	got := do(t, c, name, path, propertiesName+".GetAll", i.Name)[0].(map[string]dbus.Variant)
	if len(got) != len(i.Properties) {
		t.Errorf("%s of %s has %d properties, not %d", i.Name, path, len(got), len(i.Properties))
	}
	for _, p := range i.Properties {
		if sig := got[p.Name].Signature().String(); sig != p.Type {
			t.Errorf("%s.%s has the type %s, not %s", i.Name, p.Name, sig, p.Type)
		}
		if p.Access != "read" || len(p.Annotations) != 1 || p.Annotations[0].Name != "org.freedesktop.DBus.Property.EmitsChangedSignal" {
			t.Errorf("%s.%s: %+v", i.Name, p.Name, p)
		}
	}
}

// What methods return has the types of the introspection.
func TestResults(t *testing.T) {
	b := runningBus(t)
	b.polkit().set(polkitAnswer{Authorized: true})
	for _, p := range programs {
		p.start(t, b)
	}
	replied := make(chan string, 1) // the signature of each reply
	c, err := dbus.Connect(b.address, dbus.WithIncomingInterceptor(func(m *dbus.Message) {
		if m.Type == dbus.TypeMethodReply {
			select {
			case <-replied:
			default:
			}
			sig, _ := m.Headers[dbus.FieldSignature].Value().(dbus.Signature)
			replied <- sig.String()
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, p := range programs {
		in := map[string][]any{"Mount": {"src", "/srv", []string{}}, "Unmount": {mountPath("a1"), uint32(0)},
			"GetAll": {peerName}, "Get": {p.own[0], "Version"}, "Reload": nil, "Exports": nil, "GetStatistics": nil, "GetManagedObjects": nil,
			"Introspect": nil, "Ping": nil}
		for _, path := range []dbus.ObjectPath{p.root + dbus.ObjectPath(p.below[1]), p.root} {
			n := introspected(t, c, p.name, path)
			for _, i := range n.Interfaces {
				for _, m := range i.Methods {
					args, ok := in[m.Name]
					if !ok || path != p.root && (m.Name == "Get" || m.Name == "Unmount") {
						continue // Set returns nothing, GetMachineId needs a file
					}
					do(t, c, p.name, path, i.Name+"."+m.Name, args...)
					if got := <-replied; got != m.types("out") {
						t.Errorf("%s.%s returns %q, not %q", i.Name, m.Name, got, m.types("out"))
					}
				}
			}
		}
	}
}

// The man pages have all members, with their types, and no others.
func TestManPages(t *testing.T) {
	for _, p := range programs {
		t.Run(p.name, func(t *testing.T) {
			page, err := os.ReadFile(filepath.Join("../../packaging/man", p.name+".5.md"))
			if err != nil {
				t.Fatal(err)
			}
			b := runningBus(t)
			p.start(t, b)
			want := map[string][]string{}
			for _, n := range tree(t, b.user(), p.name, p.root) {
				for _, i := range n.Interfaces {
					if !strings.HasPrefix(i.Name, p.name) {
						continue
					}
					for _, m := range i.Properties {
						constant := ""
						if m.Annotations[0].Value == "const" {
							constant = ", constant"
						}
						k := "Properties of " + i.Name
						want[k] = append(want[k], fmt.Sprintf("**%s** (%s%s)", m.Name, m.Type, constant))
					}
					for _, m := range i.Methods {
						args := func(direction string) string {
							var as []string
							for _, a := range m.Args {
								if a.Direction == direction {
									as = append(as, fmt.Sprintf("%s *%s*", a.Type, a.Name))
								}
							}
							return strings.Join(as, ", ")
						}
						line := fmt.Sprintf("**%s** (%s)", m.Name, args("in"))
						if out := args("out"); out != "" {
							line += " → " + out
						}
						k := "Methods of " + i.Name
						want[k] = append(want[k], line)
					}
				}
			}
			got := map[string][]string{}
			section := ""
			for line := range strings.SplitSeq(string(page), "\n") {
				if title, ok := strings.CutPrefix(line, "#"); ok {
					section = strings.TrimLeft(title, "# ")
				} else if strings.HasPrefix(section, "Properties of ") || strings.HasPrefix(section, "Methods of ") {
					if strings.HasPrefix(line, "**") {
						got[section] = append(got[section], line)
					}
				}
			}
			for _, m := range []map[string][]string{got, want} {
				for _, lines := range m {
					slices.Sort(lines)
				}
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Error(d)
			}
			for _, title := range []string{"NAME", "DESCRIPTION", "THE MANAGER OBJECT", "ERRORS", "EXAMPLES", "SEE ALSO"} {
				if !strings.Contains(string(page), "\n# "+title+"\n") {
					t.Errorf("there is no section %s", title)
				}
			}
			if !strings.HasPrefix(string(page), "% "+strings.ToUpper(p.name)+" 5\n") {
				t.Error("the page has no title")
			}
		})
	}
}

// The guest's man page has the kinds of errors, the statistics and polkit's actions.
func TestManPageWords(t *testing.T) {
	page, err := os.ReadFile("../../packaging/man/org.transfused1.5.md")
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	_, errs, _ := strings.Cut(string(page), "\n# ERRORS\n")
	errs, _, _ = strings.Cut(errs, "\n# ")
	for _, m := range regexp.MustCompile(`(?m)^\*\*(\w+)\*\*$`).FindAllStringSubmatch(errs, -1) {
		kinds = append(kinds, m[1])
	}
	if d := cmp.Diff(kindsOfAPI(t), kinds); d != "" {
		t.Error(d)
	}
	b := runningBus(t)
	serveGuest(t, b, newGuest(aMount("a1")), Config{})
	for key := range do(t, b.user(), GuestName, mountPath("a1"), GuestName+".Mount.GetStatistics")[0].(map[string]dbus.Variant) {
		if !strings.Contains(string(page), "*"+key+"*") {
			t.Errorf("nothing of %s", key)
		}
	}
	for _, s := range []api.State{api.Mounting, api.Active, api.Reconnecting, api.Draining, api.Failed} {
		if !strings.Contains(string(page), "*"+string(s)+"*") {
			t.Errorf("nothing of the state %s", s)
		}
	}
}

// kindsOfAPI reads the kinds where they are declared.
func kindsOfAPI(t *testing.T) []string {
	src, err := os.ReadFile("../api/error.go")
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, m := range regexp.MustCompile(`(?m)^\s(\w+)\s+Kind = "(\w+)"`).FindAllStringSubmatch(string(src), -1) {
		kinds = append(kinds, m[2])
	}
	if len(kinds) == 0 {
		t.Fatal("no kinds in error.go")
	}
	return kinds
}

type policyAction struct {
	ID          string `xml:"id,attr"`
	Description string `xml:"description"`
	Message     string `xml:"message"`
	Any         string `xml:"defaults>allow_any"`
	Inactive    string `xml:"defaults>allow_inactive"`
	Active      string `xml:"defaults>allow_active"`
}

// Polkit's policies have the actions that are asked for, the man pages name them, and everybody needs an administrator's password.
func TestPolicies(t *testing.T) {
	for name, want := range map[string][]string{
		GuestName: {"org.transfused1.mount", "org.transfused1.reload", "org.transfused1.unmount"},
		HostName:  {"org.transfused.Host1.reload"},
	} {
		var policy struct {
			XMLName xml.Name       `xml:"policyconfig"`
			Actions []policyAction `xml:"action"`
		}
		file := packaged(t, name+".policy")
		if err := xml.Unmarshal(file, &policy); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(file), `<!DOCTYPE policyconfig PUBLIC "-//freedesktop//DTD PolicyKit Policy Configuration 1.0//EN"`) {
			t.Error("no DTD")
		}
		page, err := os.ReadFile(filepath.Join("../../packaging/man", name+".5.md"))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, a := range policy.Actions {
			got = append(got, a.ID)
			if a.Description == "" || a.Message == "" || a.Any != "auth_admin_keep" || a.Inactive != "auth_admin_keep" || a.Active != "auth_admin_keep" {
				t.Errorf("%+v", a)
			}
			if !strings.Contains(string(page), "*"+a.ID+"*") {
				t.Errorf("the man page says nothing of %s", a.ID)
			}
		}
		slices.Sort(got)
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
}

// The bus starts the guest's daemon by a unit that is there only while the service is enabled.
func TestServiceFile(t *testing.T) {
	var got []string
	for line := range strings.SplitSeq(string(packaged(t, "org.transfused1.service")), "\n") {
		if line != "" && !strings.HasPrefix(line, "#") {
			got = append(got, line)
		}
	}
	want := []string{"[D-BUS Service]", "Name=org.transfused1", "Exec=/bin/false", "User=root", "SystemdService=dbus-org.transfused1.service"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
