// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"encoding/xml"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/introspect"
)

// iface is a D-Bus interface: what is introspected, checked and called.
type iface struct {
	name       string
	methods    []method
	signals    []signal
	properties []property
}

type method struct {
	name    string
	in, out []arg
	// call answers. Its arguments have the types of in, its results those of out.
	call func(*call) ([]any, error)
	// locked methods wait for nothing: they are called and answered with connection.mu held, so that no signal comes between.
	locked bool
}

type arg struct{ name, typ string }

type signal struct {
	name string
	args []arg
}

// property is read-only: whatever changes something is a method, whose caller can be asked about.
type property struct {
	name, typ string
	constant  bool // while the object is there; the others are told by PropertiesChanged
}

// object is what a daemon has at a path at one moment.
type object struct {
	iface  *iface
	values []any // of the interface's properties, in their order
}

// properties are as D-Bus carries them.
func (o object) properties() map[string]dbus.Variant {
	m := make(map[string]dbus.Variant, len(o.values))
	for i, p := range o.iface.properties {
		m[p.name] = dbus.MakeVariant(o.values[i])
	}
	return m
}

// changed are the properties that differ from before, but for constant ones.
func (o object) changed(before object) map[string]dbus.Variant {
	m := map[string]dbus.Variant{}
	for i, p := range o.iface.properties {
		if !p.constant && !reflect.DeepEqual(o.values[i], before.values[i]) {
			m[p.name] = dbus.MakeVariant(o.values[i])
		}
	}
	return m
}

// text is s as D-Bus can carry it: names of files and what a peer says may be any bytes.
func text(s string) string {
	return strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", ""), "\uFFFD")
}

func texts(ss []string) []string {
	out := make([]string, len(ss))
	for i, s := range ss {
		out[i] = text(s)
	}
	return out
}

// since is t in microseconds since the epoch, 0 for never: as systemd has its times.
func since(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	return uint64(t.UnixMicro())
}

// The interfaces that D-Bus itself has (D-Bus specification, Standard Interfaces).
const (
	peerName       = "org.freedesktop.DBus.Peer"
	introspectName = "org.freedesktop.DBus.Introspectable"
	propertiesName = "org.freedesktop.DBus.Properties"
	managerName    = "org.freedesktop.DBus.ObjectManager"
)

// everywhere are the interfaces of every node. They are set by init because Introspect returns them too.
var everywhere []*iface

func init() {
	everywhere = []*iface{
		{name: introspectName, methods: []method{
			{name: "Introspect", out: []arg{{"xml_data", "s"}}, call: introspectNode, locked: true},
		}},
		{name: peerName, methods: []method{
			{name: "GetMachineId", out: []arg{{"machine_uuid", "s"}}, call: machineID, locked: true},
			{name: "Ping", call: func(*call) ([]any, error) { return nil, nil }, locked: true},
		}},
		{name: propertiesName, methods: []method{
			{name: "Get", in: []arg{{"interface_name", "s"}, {"property_name", "s"}}, out: []arg{{"value", "v"}}, call: getProperty, locked: true},
			{name: "GetAll", in: []arg{{"interface_name", "s"}}, out: []arg{{"properties", "a{sv}"}}, call: getProperties, locked: true},
			{name: "Set", in: []arg{{"interface_name", "s"}, {"property_name", "s"}, {"value", "v"}}, call: setProperty, locked: true},
		}, signals: []signal{
			{"PropertiesChanged", []arg{{"interface_name", "s"}, {"changed_properties", "a{sv}"}, {"invalidated_properties", "as"}}},
		}},
	}
}

var objectManager = &iface{name: managerName, methods: []method{
	{name: "GetManagedObjects", out: []arg{{"objects", "a{oa{sa{sv}}}"}}, call: managedObjects, locked: true},
}, signals: []signal{
	{"InterfacesAdded", []arg{{"object_path", "o"}, {"interfaces_and_properties", "a{sa{sv}}"}}},
	{"InterfacesRemoved", []arg{{"object_path", "o"}, {"interfaces", "as"}}},
}}

// interfaces are those of the node at path, own ones first, and none where there is no node. Nodes are the objects and all on
// the way to them. Precondition: c.mu is held.
func (c *connection) interfaces(path dbus.ObjectPath) []*iface {
	if o, ok := c.objects[path]; ok {
		own := []*iface{o.iface}
		if path == c.served.root {
			own = append(own, objectManager)
		}
		return append(own, everywhere...)
	}
	if len(c.children(path)) > 0 {
		return everywhere
	}
	return nil
}

// children are the names of the nodes under path. Precondition: c.mu is held.
func (c *connection) children(path dbus.ObjectPath) []string {
	prefix := strings.TrimSuffix(string(path), "/") + "/"
	var names []string
	for p := range c.objects {
		if rest, ok := strings.CutPrefix(string(p), prefix); ok && rest != "" {
			name, _, _ := strings.Cut(rest, "/")
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func introspectNode(c *call) ([]any, error) {
	var n introspect.Node
	for _, i := range c.conn.interfaces(c.path) {
		n.Interfaces = append(n.Interfaces, i.introspection())
	}
	for _, name := range c.conn.children(c.path) {
		n.Children = append(n.Children, introspect.Node{Name: name})
	}
	b, err := xml.MarshalIndent(n, "", " ")
	if err != nil {
		return nil, err
	}
	return []any{strings.TrimLeft(introspect.IntrospectDeclarationString, "\n\t ") + string(b) + "\n"}, nil
}

func (i *iface) introspection() introspect.Interface {
	out := introspect.Interface{Name: i.name}
	args := func(as []arg, direction string) (out []introspect.Arg) {
		for _, a := range as {
			out = append(out, introspect.Arg{Name: a.name, Type: a.typ, Direction: direction})
		}
		return out
	}
	for _, m := range i.methods {
		out.Methods = append(out.Methods, introspect.Method{Name: m.name, Args: append(args(m.in, "in"), args(m.out, "out")...)})
	}
	for _, s := range i.signals {
		out.Signals = append(out.Signals, introspect.Signal{Name: s.name, Args: args(s.args, "")})
	}
	for _, p := range i.properties {
		emits := "true"
		if p.constant {
			emits = "const"
		}
		out.Properties = append(out.Properties, introspect.Property{Name: p.name, Type: p.typ, Access: "read",
			Annotations: []introspect.Annotation{{Name: "org.freedesktop.DBus.Property.EmitsChangedSignal", Value: emits}}})
	}
	return out
}

// machineID is in our words since godbus answers with the bus's id.
func machineID(*call) ([]any, error) {
	b, err := os.ReadFile("/etc/machine-id")
	if err != nil {
		return nil, err
	}
	return []any{strings.TrimSpace(string(b))}, nil
}

// propertiesOf are the properties of the interface name at the caller's path, of all for "". Precondition: mu is held.
func (c *call) propertiesOf(name string) (map[string]dbus.Variant, error) {
	o, ok := c.conn.objects[c.path]
	if ok && (name == "" || name == o.iface.name) {
		return o.properties(), nil
	}
	for _, i := range c.conn.interfaces(c.path) {
		if name == "" || i.name == name {
			return map[string]dbus.Variant{}, nil
		}
	}
	return nil, standard("UnknownInterface", "%s has no interface %s", c.path, name)
}

// propertyOf is one of them.
func (c *call) propertyOf(name, property string) (dbus.Variant, error) {
	all, err := c.propertiesOf(name)
	if err != nil {
		return dbus.Variant{}, err
	}
	v, ok := all[property]
	if !ok {
		return dbus.Variant{}, standard("UnknownProperty", "interface %s of %s has no property %s", name, c.path, property)
	}
	return v, nil
}

func getProperty(c *call) ([]any, error) {
	v, err := c.propertyOf(c.args[0].(string), c.args[1].(string))
	return []any{v}, err
}

func getProperties(c *call) ([]any, error) {
	all, err := c.propertiesOf(c.args[0].(string))
	return []any{all}, err
}

func setProperty(c *call) ([]any, error) {
	if _, err := c.propertyOf(c.args[0].(string), c.args[1].(string)); err != nil {
		return nil, err
	}
	return nil, standard("PropertyReadOnly", "property %s is read-only", c.args[1])
}

func managedObjects(c *call) ([]any, error) {
	all := map[dbus.ObjectPath]map[string]map[string]dbus.Variant{}
	for path, o := range c.conn.objects {
		if path != c.conn.served.root {
			all[path] = map[string]map[string]dbus.Variant{o.iface.name: o.properties()}
		}
	}
	return []any{all}, nil
}

// standard is an error with a name that every D-Bus library knows.
func standard(name, format string, args ...any) error {
	return dbus.NewError("org.freedesktop.DBus.Error."+name, []any{text(fmt.Sprintf(format, args...))})
}

// look takes the daemon's objects as they are now. It does not tell of them. Precondition: c.mu is held.
func (c *connection) look() {
	c.objects = c.served.objects()
}

// update looks at the daemon and tells what changed.
func (c *connection) update() {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.objects
	c.look()
	for _, path := range slices.Sorted(maps.Keys(before)) {
		if _, ok := c.objects[path]; !ok {
			c.emit(c.served.root, managerName+".InterfacesRemoved", path, []string{before[path].iface.name})
		}
	}
	for _, path := range slices.Sorted(maps.Keys(c.objects)) {
		o := c.objects[path]
		if old, ok := before[path]; !ok {
			c.emit(c.served.root, managerName+".InterfacesAdded", path, map[string]map[string]dbus.Variant{o.iface.name: o.properties()})
		} else if changed := o.changed(old); len(changed) > 0 {
			c.emit(path, propertiesName+".PropertiesChanged", o.iface.name, changed, []string{})
		}
	}
}

func (c *connection) emit(path dbus.ObjectPath, signal string, values ...any) {
	if err := c.bus.Emit(path, signal, values...); err != nil {
		// The connection ends with it, or the signal can't be encoded.
		c.log.Debug("D-Bus signal", "signal", signal, "path", path, "error", err)
	}
}
