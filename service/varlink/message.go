// SPDX-License-Identifier: Apache-2.0

package varlink

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// Bounds of messages.
const (
	MaxCall  = 64 << 10 // bytes of a call, without its NUL
	MaxReply = 1 << 20  // bytes of a reply, without its NUL
	MaxFiles = 16       // descriptors beside a message
)

// call is a call as it is sent.
type call struct {
	Method     string          `json:"method"`
	Parameters json.RawMessage `json:"parameters,omitempty"`
	OneWay     bool            `json:"oneway,omitempty"`
	More       bool            `json:"more,omitempty"`
	Upgrade    bool            `json:"upgrade,omitempty"`
}

// reply is a reply as it is sent.
type reply struct {
	Parameters json.RawMessage `json:"parameters,omitempty"`
	Continues  bool            `json:"continues,omitempty"`
	Error      string          `json:"error,omitempty"`
}

// Errors that every server has.
const (
	InterfaceNotFound    = service + ".InterfaceNotFound"
	MethodNotFound       = service + ".MethodNotFound"
	MethodNotImplemented = service + ".MethodNotImplemented"
	InvalidParameter     = service + ".InvalidParameter"
	PermissionDenied     = service + ".PermissionDenied"
	ExpectedMore         = service + ".ExpectedMore"
)

// Error is a reply that says that a call failed.
type Error struct {
	Name       string // with its interface
	Parameters json.RawMessage
}

func (e *Error) Error() string {
	var p struct{ Text, Parameter, Method, Interface string }
	// Parameters of another shape have no text.
	_ = json.Unmarshal(e.Parameters, &p)
	switch {
	case p.Text != "":
		return p.Text
	case e.Name == ExpectedMore:
		return "this method has more than one reply: call it with more"
	case p.Parameter != "":
		return fmt.Sprintf("parameter %q is not valid", p.Parameter)
	case e.Name == InterfaceNotFound:
		return fmt.Sprintf("there is no interface %q", p.Interface)
	case p.Method != "":
		return fmt.Sprintf("there is no method %q", p.Method)
	}
	return e.Name
}

// NewError makes an error of a name with its interface, and of parameters that encode to a JSON object.
func NewError(name string, parameters any) *Error {
	b, err := object(parameters)
	if err != nil {
		b, _ = json.Marshal(map[string]string{"text": err.Error()})
	}
	return &Error{Name: name, Parameters: b}
}

// invalid refuses a parameter, or with an empty name the message.
func invalid(parameter, text string) *Error {
	return NewError(InvalidParameter, struct {
		Parameter string `json:"parameter"`
		Text      string `json:"text"`
	}{parameter, text})
}

// object encodes parameters; nil is an empty object.
func object(v any) (json.RawMessage, error) {
	if v == nil {
		return json.RawMessage("{}"), nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("varlink: encode %T: %w", v, err)
	}
	return b, nil
}

// decodeCall reads a call. Keys that it does not know are left alone, as varlink wants it.
func decodeCall(b []byte) (call, error) {
	var c call
	if err := json.Unmarshal(b, &c); err != nil {
		return c, invalid("", "the call is no JSON object of varlink: "+err.Error())
	}
	p := bytes.TrimSpace(c.Parameters)
	if len(p) == 0 || string(p) == "null" {
		c.Parameters = json.RawMessage("{}")
	} else if p[0] != '{' {
		return c, invalid("parameters", "parameters must be a JSON object")
	}
	if c.Upgrade {
		return c, invalid("upgrade", "no method of this service upgrades its connection")
	}
	if !strings.Contains(c.Method, ".") {
		return c, invalid("method", fmt.Sprintf("method %q has no interface: call INTERFACE.METHOD", c.Method))
	}
	return c, nil
}

// decodeParameters decodes parameters into v and refuses those that it does not have.
func decodeParameters(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == nil {
		return nil
	}
	var typ *json.UnmarshalTypeError
	if errors.As(err, &typ) {
		return invalid(typ.Field, fmt.Sprintf("parameter %q can't be a %s", typ.Field, typ.Value))
	}
	if _, name, ok := strings.Cut(err.Error(), "unknown field "); ok {
		name = strings.Trim(name, `"`)
		return invalid(name, fmt.Sprintf("parameter %q is not known", name))
	}
	return invalid("", err.Error())
}
