// SPDX-License-Identifier: Apache-2.0

// Package config reads the files that both programs have: a configuration in TOML, and a token. What is in them is the
// programs' own business.
//
// Decisions:
//   - A mistake is one line that begins with the file and the line, as compilers do it.
//   - An unknown key is a mistake: most often it is a known one, misspelt.
package config
