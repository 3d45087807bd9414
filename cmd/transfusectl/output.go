// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// jsonMode is the flag --json.
type jsonMode int

const (
	jsonOff jsonMode = iota
	jsonShort
	jsonPretty
)

var jsonModes = []string{jsonOff: "off", jsonShort: "short", jsonPretty: "pretty"}

func (m *jsonMode) String() string { return jsonModes[*m] }
func (m *jsonMode) Type() string   { return "mode" }
func (m *jsonMode) Set(s string) error {
	for i, name := range jsonModes {
		if s == name {
			*m = jsonMode(i)
			return nil
		}
	}
	return fmt.Errorf("there are %s", strings.Join(jsonModes, ", "))
}

// write writes v as JSON, in a line of its own or, pretty, in many.
func (m jsonMode) write(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	if m == jsonPretty {
		e.SetIndent("", "\t")
	}
	return e.Encode(v)
}

// show writes v as JSON if that is wanted, else what text writes, through a pager where there is a person.
func (a *app) show(cmd *cobra.Command, v any, text func(io.Writer)) error {
	if a.json != jsonOff {
		return a.json.write(cmd.OutOrStdout(), v)
	}
	var b bytes.Buffer
	text(&b)
	if name := pager(); a.terminal && !a.noPager && name != nil {
		// Not with the command's context: Ctrl-C is for the pager, which may not end by it.
		p := exec.Command(name[0], name[1:]...)
		p.Stdin, p.Stdout, p.Stderr = &b, os.Stdout, os.Stderr
		// F: none for what fits the screen; R: colors; X: leave it there. LESSSECURE: it may be started by sudo.
		p.Env = append(os.Environ(), "LESS=FRSXMK", "LESSCHARSET=utf-8", "LESSSECURE=1")
		kept := bytes.Clone(b.Bytes())
		err := p.Start()
		if err == nil {
			_ = p.Wait() // a person who leaves it early is no failure
			return nil
		}
		b = *bytes.NewBuffer(kept)
	}
	_, err := cmd.OutOrStdout().Write(b.Bytes())
	return err
}

// pager is the pager's command; nil for none.
func pager() []string {
	for _, name := range []string{"SYSTEMD_PAGER", "PAGER"} {
		if v, ok := os.LookupEnv(name); ok {
			if f := strings.Fields(v); len(f) > 0 && f[0] != "cat" {
				return f
			}
			return nil
		}
	}
	if _, err := exec.LookPath("less"); err != nil {
		return nil
	}
	return []string{"less"}
}

// style is how a word looks on a terminal.
type style string

const (
	plain  style = ""
	bold   style = "1"
	good   style = "32"
	notice style = "33"
	bad    style = "1;31"
	faint  style = "2"
)

func (a *app) paint(s style, text string) string {
	if !a.color || s == plain || text == "" {
		return text
	}
	return "\x1b[" + string(s) + "m" + text + "\x1b[0m"
}

// cell is a cell of a table.
type cell struct {
	text  string
	style style
	right bool // numbers
}

func text(s string) cell   { return cell{text: s} }
func number(n uint64) cell { return figure(strconv.FormatUint(n, 10)) }
func figure(s string) cell { return cell{text: s, right: true} }
func texts(s ...string) (c []cell) {
	for _, s := range s {
		c = append(c, text(s))
	}
	return c
}

// table writes aligned columns, the headings first unless there is none.
func (a *app) table(w io.Writer, headings []string, rows [][]cell) {
	if headings != nil && !a.noLegend {
		head := make([]cell, len(headings))
		for i, h := range headings {
			head[i] = cell{text: h, style: bold, right: len(rows) > 0 && rows[0][i].right}
		}
		rows = append([][]cell{head}, rows...)
	}
	var widths []int
	for _, r := range rows {
		for i := range r {
			r[i].text = clean(r[i].text)
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(r[i].text))
		}
	}
	for _, r := range rows {
		var line strings.Builder
		for i, c := range r {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text))
			if i > 0 {
				line.WriteString("  ")
			}
			switch {
			case c.right:
				line.WriteString(pad + a.paint(c.style, c.text))
			case i == len(r)-1:
				line.WriteString(a.paint(c.style, c.text))
			default:
				line.WriteString(a.paint(c.style, c.text) + pad)
			}
		}
		fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
	}
}

// clean makes text safe for a terminal: it may be a peer's.
func clean(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }) < 0 {
		return s
	}
	q := strconv.Quote(s)
	return strings.ReplaceAll(strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`), `\\`, `\`)
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// span is a time for people, in its two largest units.
func span(d time.Duration) string {
	d = max(d, 0)
	units := []struct {
		of   time.Duration
		name string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "min"}, {time.Second, "s"}}
	for i, u := range units {
		if d < u.of {
			continue
		}
		s := fmt.Sprintf("%d%s", d/u.of, u.name)
		if i+1 < len(units) {
			if rest := d % u.of / units[i+1].of; rest > 0 {
				s += fmt.Sprintf(" %d%s", rest, units[i+1].name)
			}
		}
		return s
	}
	return "0s"
}

// ago is a point in time for people; "-" for none.
func ago(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return span(time.Since(t))
}

// moment is a point in time as systemctl writes it.
func moment(t time.Time) string {
	return t.Local().Format("Mon 2006-01-02 15:04:05 MST") + "; " + ago(t) + " ago"
}

// size is a number of bytes in at most 5 characters.
func size(n float64) string {
	for _, unit := range []string{"", "K", "M", "G", "T", "P"} {
		switch {
		case n < 99.95 && unit != "":
			return fmt.Sprintf("%.1f%s", n, unit)
		case n < 1023.5:
			return fmt.Sprintf("%.0f%s", n, unit)
		}
		n /= 1024
	}
	return fmt.Sprintf("%.0fE", n)
}

// rate is a number a second in at most 5 characters.
func rate(n float64) string {
	for _, unit := range []string{"", "k", "M", "G", "T"} {
		switch {
		case n < 9999.5 && unit == "":
			return fmt.Sprintf("%.0f", n)
		case n < 99.95:
			return fmt.Sprintf("%.1f%s", n, unit)
		case n < 999.5:
			return fmt.Sprintf("%.0f%s", n, unit)
		}
		n /= 1000
	}
	return fmt.Sprintf("%.0fP", n)
}

// nanoseconds is a latency in at most 6 characters.
func nanoseconds(ns uint64) string {
	if ns < 1000 {
		return fmt.Sprintf("%dns", ns)
	}
	n := float64(ns)
	for _, unit := range []string{"us", "ms", "s"} {
		n /= 1000
		if n < 9.995 {
			return fmt.Sprintf("%.2f%s", n, unit)
		}
		if n < 999.5 || unit == "s" {
			return fmt.Sprintf("%.0f%s", n, unit)
		}
	}
	return ""
}
