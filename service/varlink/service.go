// SPDX-License-Identifier: Apache-2.0

package varlink

import "context"

// service is the interface that every varlink service has.
const service = "org.varlink.service"

const serviceDescription = `# What this service is, and what it offers
interface org.varlink.service

method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

# The description of an interface, in this language
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
`

// Info is the reply to org.varlink.service.GetInfo.
type Info struct {
	Vendor     string   `json:"vendor"`
	Product    string   `json:"product"`
	Version    string   `json:"version"`
	URL        string   `json:"url"`
	Interfaces []string `json:"interfaces"`
}

// info is org.varlink.service of s.
func (s *Server) info() Interface {
	return Interface{
		Name: service, Description: serviceDescription,
		Methods: map[string]Method{
			"GetInfo": func(_ context.Context, c *Call) error {
				if err := c.Decode(&struct{}{}); err != nil {
					return err
				}
				i := s.Info
				i.Interfaces = []string{service}
				for _, o := range s.Interfaces {
					i.Interfaces = append(i.Interfaces, o.Name)
				}
				return c.Reply(i)
			},
			"GetInterfaceDescription": func(_ context.Context, c *Call) error {
				var in struct {
					Interface string `json:"interface"`
				}
				if err := c.Decode(&in); err != nil {
					return err
				}
				i, ok := s.find(in.Interface)
				if !ok {
					return NewError(InterfaceNotFound, in)
				}
				return c.Reply(map[string]string{"description": i.Description})
			},
		},
	}
}
