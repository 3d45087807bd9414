// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"github.com/spf13/pflag"

	"transfused.org/transfused/service/config"
	"transfused.org/transfused/service/host"
	"transfused.org/transfused/service/transport"
)

// flags are the command line, as far as it was read.
type flags struct {
	root      string // in front of the configuration's directories, for tests
	exports   []host.Export
	listen    []transport.Addr
	guests    []host.Guest
	file      string
	tokenFile string
	control   string
	metrics   string
	spin      transport.Spin
	anyPort   bool
	bus       bool
	debug     bool
}

func (f *flags) define(fs *pflag.FlagSet) {
	fs.SortFlags = false
	fs.VarP(value("ADDR", func(s string) error {
		a, err := transport.Parse(s)
		f.listen = append(f.listen, a)
		return err
	}), "listen", "l", "listen on `ADDR`; may be repeated")
	fs.VarP(value("TAG=DIR", func(s string) error {
		e, err := host.ParseExport(s)
		f.exports = append(f.exports, e)
		return err
	}), "export", "e", "export `TAG=DIR[,option…]`; may be repeated")
	fs.Var(value("ADDR", func(s string) error {
		a, err := transport.Parse(s)
		f.guests = append(f.guests, host.Guest{Addr: a})
		return err
	}), "guest", "ask the guest that listens on `ADDR` to mount what the --mount behind it say; may be repeated")
	fs.Var(value("TAG=GUESTDIR", func(s string) error {
		if len(f.guests) == 0 {
			return errors.New("give the --guest ADDR to mount at before it")
		}
		m, err := host.ParseGuestMount(s)
		g := &f.guests[len(f.guests)-1]
		g.Mounts = append(g.Mounts, m)
		return err
	}), "mount", "have the --guest before it mount `TAG=GUESTDIR[,option…]`; may be repeated")
	fs.StringVarP(&f.file, "config", "c", "", "read `FILE` alone (TOML), in place of the system's configuration; flags win")
	fs.StringVar(&f.tokenFile, "token-file", "", "`FILE` with the token that guests prove themselves by, where the transport does not (hybrid vsock)")
	fs.BoolVar(&f.anyPort, "allow-unprivileged-guests", false, "serve guests' processes that are not root (source ports from 1024 on), or may not be")
	fs.StringVar(&f.control, "control", nowhere, "`ADDR` of the control socket, for transfusectl: unix:PATH; \"none\" for none")
	fs.StringVar(&f.metrics, "metrics", nowhere, "serve metrics (OpenMetrics) by HTTP at `ADDR`: HOST:PORT or unix:PATH; \"none\" for nowhere")
	fs.BoolVar(&f.bus, "bus", false, "be org.transfused.Host1 on the system bus (D-Bus); for one server of a machine")
	fs.Var(value("TIME", func(s string) (err error) {
		f.spin, err = transport.ParseSpin(s)
		return err
	}), "spin", "after a message look for the next one for `TIME` before sleeping, while that pays; 0: never")
	fs.BoolVar(&f.debug, "debug", false, "log more")
}

// nowhere is the address of what is not listened for.
const nowhere = "none"

// settable is a flag that is read by a function.
type settable struct {
	kind string
	set  func(string) error
}

func value(kind string, set func(string) error) pflag.Value { return settable{kind, set} }

func (v settable) String() string     { return "" }
func (v settable) Set(s string) error { return v.set(s) }
func (v settable) Type() string       { return v.kind }

// configFile is the configuration file.
type configFile struct {
	Listen            []transport.Addr          `toml:"listen"`
	TokenFile         string                    `toml:"token-file"`
	AllowUnprivileged bool                      `toml:"allow-unprivileged-guests"`
	Control           string                    `toml:"control"`
	Metrics           string                    `toml:"metrics"`
	Spin              *transport.Spin           `toml:"spin"`
	Debug             bool                      `toml:"debug"`
	Export            map[string]map[string]any `toml:"export"`
	Guest             map[string]struct {
		Address transport.Addr `toml:"address"`
		Mounts  []string       `toml:"mounts"`
	} `toml:"guest"`
}

// settings are flags and configuration together.
type settings struct {
	host.Config
	debug   bool
	control transport.Addr // none: the zero value
	metrics string         // HOST:PORT or unix:PATH; none: empty
}

func (s *settings) level() slog.Level {
	if s.debug {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

// addresses takes the addresses that are not for guests.
func (s *settings) addresses(control, metrics string) error {
	if control != nowhere {
		a, err := transport.Parse(control)
		if err == nil && a.Family != transport.Unix {
			err = fmt.Errorf("%s: a Unix socket is wanted, unix:PATH", a)
		}
		if err != nil {
			return fmt.Errorf("control: %w", err)
		}
		s.control = a
	}
	if metrics != nowhere {
		if err := checkMetrics(metrics); err != nil {
			return fmt.Errorf("metrics: %w", err)
		}
		s.metrics = metrics
	}
	return nil
}

// config puts configuration, flags and the sockets that this process was started with together. It changes nothing, so that
// the server can have it again when it is told to reload.
func (f *flags) config(set *pflag.FlagSet, inherited []*transport.Listener) (all settings, err error) {
	c, file, err := f.readConfig()
	if err != nil {
		return all, err
	}
	tokenFile := f.tokenFile
	if !set.Changed("token-file") {
		tokenFile = file.TokenFile
	}
	c.AllowUnprivileged, all.debug = file.AllowUnprivileged, file.Debug
	if len(f.listen) > 0 {
		c.Listen = f.listen
	}
	c.Inherited = inherited
	given := len(c.Exports)
	for _, e := range f.exports {
		// Only those of the file: a tag given twice here is a mistake.
		if i := slices.IndexFunc(c.Exports[:given], func(o host.Export) bool { return o.Tag == e.Tag }); i >= 0 {
			c.Exports = slices.Delete(c.Exports, i, i+1)
			given--
		}
		c.Exports = append(c.Exports, e)
	}
	given = len(c.Guests)
	for _, g := range f.guests {
		if i := slices.IndexFunc(c.Guests[:given], func(o host.Guest) bool { return o.Addr == g.Addr }); i >= 0 {
			c.Guests = slices.Delete(c.Guests, i, i+1)
			given--
		}
		c.Guests = append(c.Guests, g)
	}
	if set.Changed("allow-unprivileged-guests") {
		c.AllowUnprivileged = f.anyPort
	}
	c.Spin = transport.DefaultSpin
	if file.Spin != nil {
		c.Spin = *file.Spin
	}
	if set.Changed("spin") {
		c.Spin = f.spin
	}
	if set.Changed("debug") {
		all.debug = f.debug
	}
	control, metrics := f.control, f.metrics
	if !set.Changed("control") {
		control = cmp.Or(file.Control, nowhere)
	}
	if !set.Changed("metrics") {
		metrics = cmp.Or(file.Metrics, nowhere)
	}
	if err := all.addresses(control, metrics); err != nil {
		return all, err
	}
	if tokenFile != "" {
		c.Token, err = config.Token(tokenFile)
	} else if !set.Changed("token-file") {
		c.Token, err = config.CredentialToken(f.root, "transfuse-host")
	}
	if err != nil {
		return all, err
	}
	all.Config = c
	return all, c.Check()
}

// readConfig reads the configuration.
func (f *flags) readConfig() (c host.Config, file configFile, err error) {
	var read *config.Config
	if f.file != "" {
		read, err = config.Read(f.file, &file)
	} else {
		read, err = config.ReadAll(f.root, config.Host, &file)
	}
	if err != nil {
		return c, file, err
	}
	at := read.At
	c.Listen = file.Listen
	for _, name := range slices.Sorted(maps.Keys(file.Export)) {
		e, key, err := exportOf(name, file.Export[name])
		if err != nil {
			return c, file, fmt.Errorf("%s: export %s: %w", at("export", name, key), name, err)
		}
		c.Exports = append(c.Exports, e)
	}
	for _, name := range slices.Sorted(maps.Keys(file.Guest)) {
		g := host.Guest{Addr: file.Guest[name].Address}
		if g.Addr == (transport.Addr{}) {
			return c, file, fmt.Errorf("%s: guest %s: no address: write address = \"vsock:CID:PORT\"", at("guest", name), name)
		}
		for _, s := range file.Guest[name].Mounts {
			m, err := host.ParseGuestMount(s)
			if err != nil {
				return c, file, fmt.Errorf("%s: guest %s: %w", at("guest", name, "mounts"), name, err)
			}
			g.Mounts = append(g.Mounts, m)
		}
		c.Guests = append(c.Guests, g)
	}
	return c, file, nil
}

// exportOf makes an export of its table. An error comes with the key it is of.
func exportOf(name string, table map[string]any) (e host.Export, key string, err error) {
	e.Tag = name
	for _, key := range slices.Sorted(maps.Keys(table)) {
		switch text, isText := table[key].(string); key {
		case "tag", "dir":
			if !isText {
				return e, key, fmt.Errorf("%s must be a text: write %[1]s = \"…\"", key)
			}
			if key == "tag" {
				e.Tag = text
			} else {
				e.Dir = text
			}
		default:
			values, isList := table[key].([]any)
			if !isList {
				values = []any{table[key]}
			}
			for _, v := range values {
				switch v.(type) {
				case string, bool, int64:
				default:
					return e, key, fmt.Errorf("option %s must be a text, a number, yes or no, or a list of those", key)
				}
				if err := e.Set(key, fmt.Sprint(v), true); err != nil {
					return e, key, err
				}
			}
		}
	}
	if e.Dir == "" {
		return e, "", errors.New("no directory: write dir = \"/…\"")
	}
	return e, "", nil
}
