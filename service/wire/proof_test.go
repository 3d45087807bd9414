// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"slices"
	"testing"
)

// TestProof checks Proof against the transcript, whose answer is openssl's:
//
//	(printf 'transfuse guest\0'; nonce) | openssl dgst -sha256 -hmac secret
func TestProof(t *testing.T) {
	conns := transcript(t, "testdata/v2/session.txt")
	proof := conns[len(conns)-1]
	ask, answer := proof[0].bytes, proof[1].bytes
	if len(ask) != 1+NonceLen || ask[0] != SubProof {
		t.Fatalf("the host asks %x", ask)
	}
	if got := Proof([]byte("secret"), ask[1:]); !slices.Equal(got[:], answer) {
		t.Errorf("%x, want %x", got, answer)
	}
	if got := Proof([]byte("Secret"), ask[1:]); slices.Equal(got[:], answer) {
		t.Error("another token gives the same answer")
	}
}
